"""The reference's hidden states at response positions, kept on disk: for a preference stage of several epochs, or of several runs.

A state takes hidden_size numbers, the logits that the head makes of it vocab_size: so states are kept, and the head stays in memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Optional

import numpy as np
import torch
import tqdm

from batching import Example, TokenizedSplit
from parallel import World
from scoring import ReferenceOnly, Scorer
from shared_prompt import PromptRows
from utils import UserError, plural

FORMAT = 1  # of the file, and of how rows are computed


class ReferenceCache:
    """One file of (positions, hidden) numbers: of each example in turn its chosen response's positions, then its rejected one's.

    Args:
        cache_dir: the user's folder for such things.
        split: where the examples come from.
        examples: those that will be asked for, each once.
        hidden: numbers a state.
        dtype: in which the reference computes.
        identity: of the reference's weights, and of what else decides its states.
    """

    def __init__(
        self, cache_dir: str, split: TokenizedSplit, examples: Sequence[Example], hidden: int, dtype: torch.dtype, identity: Mapping
    ):
        self.split, self.hidden, self.dtype = split, hidden, dtype
        indices = np.array(sorted(map(split.index, examples)))
        counts = split.response_tokens()[indices]
        self.stop = np.zeros(len(split), np.int64)
        self.stop[indices] = np.cumsum(counts)
        self.counts = split.response_tokens()
        self.n_examples, self.positions = len(indices), int(counts.sum())
        self.bytes = self.positions * hidden * dtype.itemsize
        key = [FORMAT, split.fingerprint, hashlib.sha256(indices.tobytes()).hexdigest(), hidden, str(dtype), sorted(identity.items())]
        self.file = os.path.join(cache_dir, "reference", hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32])
        self._values: Optional[torch.Tensor] = None

    def is_there(self) -> bool:
        return os.path.exists(self.file) and os.path.getsize(self.file) == self.bytes

    def plan(self) -> str:
        """'96 examples, 2,912 positions x 32 numbers x 4 bytes = 0.000 GB in <file>; 12.3 GB are free'."""
        free = shutil.disk_usage(_existing_parent(self.file)).free
        return (
            f"{plural(self.n_examples, 'example')}, {self.positions:,} positions x {self.hidden} numbers x {self.dtype.itemsize} bytes = "
            f"{self.bytes / 1e9:.3f} GB in {self.file}; {free / 1e9:.1f} GB are free"
        )

    def create(self) -> None:
        """An empty file beside the place of the whole one, with all its space.

        Raises:
            UserError: the disk has not that much.
        """
        free = shutil.disk_usage(_existing_parent(self.file)).free
        if free < self.bytes:
            raise UserError(
                f"reference_cache=true needs {self.bytes / 1e9:.3f} GB in {os.path.dirname(self.file)}; {free / 1e9:.3f} GB are free\n"
                "set local_dirs to a larger disk, or reference_cache=false"
            )
        try:
            os.makedirs(os.path.dirname(self.file), exist_ok=True)
            with open(self.new, "wb") as file:
                # Else a disk that fills up would kill the process where it writes to the mapping.
                (os.posix_fallocate if hasattr(os, "posix_fallocate") else _extend)(file.fileno(), 0, self.bytes)
        except OSError as error:
            self.discard()
            raise UserError(f"reference_cache=true: {self.new} cannot be written: {error}") from None

    @property
    def new(self) -> str:
        return self.file + ".new"

    def open(self, file: str) -> None:
        """Map the file: the one that is being written, or the whole one, of which no change would be kept."""
        self._values = torch.from_file(file, shared=file == self.new, size=self.positions * self.hidden, dtype=self.dtype)
        self._values = self._values.view(self.positions, self.hidden)

    def fill(
        self, microbatches: Iterable, scorer: Scorer, world: World, check_stop: Callable[[], None], hide_progress: Optional[bool]
    ) -> None:
        """Compute the states and write them, all ranks into one file; whole or not there, also where a signal or an error ends it.

        Args:
            microbatches: this rank's, (examples, rows) each, so that over all ranks every example is in one.
            scorer: with the reference.
            check_stop: raises where the run is to end.
            hide_progress: tqdm's `disable`.
        """
        world.from_first(self.create)
        try:
            with world.agreed():
                self.open(self.new)
            for examples, rows in tqdm.tqdm(microbatches, "Reference", unit=" microbatches", disable=hide_progress):
                check_stop()
                self.write(examples, scorer(ReferenceOnly(rows)))
            world.from_first(self.publish)
        finally:
            if world.is_first:
                self.discard()

    def publish(self) -> None:
        """All ranks have written: it is whole."""
        os.replace(self.new, self.file)

    def discard(self) -> None:
        if os.path.exists(self.new):
            os.remove(self.new)

    def write(self, examples: Sequence[Example], states: torch.Tensor) -> None:
        """The first rows' states of a microbatch of these examples, in their order: (N, hidden)."""
        start = 0
        for example in examples:
            place = self._place(example)
            count = place.stop - place.start
            self._values[place] = states[start : start + count].to("cpu", self.dtype)
            start += count

    def add_to(self, rows: PromptRows, examples: Sequence[Example]) -> PromptRows:
        """The rows of these examples, with the reference's states."""
        return rows.with_reference(torch.cat([self._values[self._place(example)] for example in examples]))

    def _place(self, example: Example) -> slice:
        index = self.split.index(example)
        return slice(int(self.stop[index] - self.counts[index]), int(self.stop[index]))


def _existing_parent(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "."
    return path


def _extend(descriptor: int, _: int, size: int) -> None:
    os.truncate(descriptor, size)
