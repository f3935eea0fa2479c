"""The reference's hidden states at response positions, kept on disk: for a preference stage of several epochs, or of several runs.

A state takes hidden_size numbers, the logits that the head makes of it vocab_size: so states are kept, and the head stays in memory.
"""

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import BinaryIO, Optional

import numpy as np
import torch
import tqdm
import transformers

from tdpo.data.split import Example, TokenizedSplit
from tdpo.distributed.world import World
from tdpo.scoring.prefix_sharing import SharedPrefixBatch
from tdpo.scoring.scorer import Scorer
from tdpo.utils import UserError, plural

FORMAT = 1  # of the file, and of how rows are computed
IRRELEVANT_KEYS = ("_name_or_path", "transformers_version", "dtype", "architectures")  # of a model's config, that decide no state


def config_fingerprint(config: transformers.PreTrainedConfig) -> str:
    """What beside weights decides hidden states: heads, rotations, windows and the like."""
    values = {key: value for key, value in config.to_dict().items() if key not in IRRELEVANT_KEYS}
    attention = config.get_text_config()._attn_implementation
    return hashlib.sha256(json.dumps([values, attention, transformers.__version__], sort_keys=True, default=str).encode()).hexdigest()


class ReferenceCache:
    """One file of (positions, hidden) numbers: of each example in turn the scored positions of its responses, role by role.

    Args:
        cache_dir: the user's folder for such things.
        split: where the examples come from.
        examples: those that will be asked for.
        hidden: numbers a state.
        dtype: in which the reference computes.
        identity: of the reference's weights, and of what else decides its states.
    """

    def __init__(
        self, cache_dir: str, split: TokenizedSplit, examples: Sequence[Example], hidden: int, dtype: torch.dtype, identity: Mapping
    ):
        self.split, self.hidden, self.dtype = split, hidden, dtype
        indices = np.unique(list(map(split.index, examples)))
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
        """'96 examples, 2,912 positions x 32 numbers x 4 bytes = 0.4 MB in <file>; 12.3 GB are free'."""
        free = shutil.disk_usage(_existing_parent(self.file)).free
        return (
            f"{plural(self.n_examples, 'example')}, {self.positions:,} positions x {self.hidden} numbers x {self.dtype.itemsize} bytes = "
            f"{_size(self.bytes)} in {self.file}; {_size(free)} are free"
        )

    def fill(
        self, microbatches: Iterable, scorer: Scorer, world: World, check_stop: Callable[[], None], hide_progress: Optional[bool]
    ) -> None:
        """Compute the states and write them, all ranks into one file; whole or not there, also where a signal or an error ends it.

        Args:
            microbatches: this rank's, so that over all ranks every example is in one.
            scorer: with the reference.
            check_stop: raises where the run is to end.
            hide_progress: tqdm's `disable`.
        """
        new = world.from_first(self._create)
        try:
            with world.agreed():
                self._check(new)
            # Written by position and not through a mapping, which several machines could not share.
            with open(new, "r+b", buffering=0) as file:
                for microbatch in tqdm.tqdm(microbatches, "Reference", unit=" microbatches", disable=hide_progress):
                    check_stop()
                    self._write(file, microbatch.examples, scorer.reference_states(microbatch.batch).to("cpu", self.dtype))
                os.fsync(file.fileno())
            world.gather(None)  # all have written
            world.from_first(lambda: os.replace(new, self.file))
        finally:
            if world.is_first and os.path.exists(new):
                os.remove(new)

    def _create(self) -> str:
        """A file of zeros with all its space, of this run alone: another one may compute the same at the same time.

        Raises:
            UserError: the disk has not that much.
        """
        folder = os.path.dirname(self.file)
        own = f"{socket.gethostname()}-{os.getpid()}"
        new = f"{self.file}.{own}.new"
        try:
            os.makedirs(folder, exist_ok=True)
            self._remove_left_behind()
            free = shutil.disk_usage(folder).free
            if free < self.bytes:
                raise UserError(
                    f"reference_cache=true needs {_size(self.bytes)} in {folder}; {_size(free)} are free\n"
                    "set local_dirs to a larger disk, or reference_cache=false"
                )
            with open(new, "wb") as file:
                (os.posix_fallocate if hasattr(os, "posix_fallocate") else _extend)(file.fileno(), 0, self.bytes)
        except OSError as error:
            if os.path.exists(new):
                os.remove(new)
            raise UserError(f"reference_cache=true: {new} cannot be written: {error}; local_dirs names another disk") from None
        return new

    def _remove_left_behind(self) -> None:
        """Files of runs on this machine that were killed while they wrote them."""
        for file in glob.glob(f"{glob.escape(self.file)}.{socket.gethostname()}-*.new"):
            try:
                os.kill(int(file.removesuffix(".new").rpartition("-")[2]), 0)
            except ProcessLookupError:
                os.remove(file)
            except (ValueError, PermissionError):
                continue

    def _check(self, file: str) -> None:
        if not os.path.exists(file) or os.path.getsize(file) != self.bytes:
            raise UserError(f"reference_cache=true: this rank does not see {file}: local_dirs must name a disk that all ranks see")

    def open(self) -> None:
        """Map the file into memory.

        Raises:
            UserError: this process does not see it.
        """
        self._check(self.file)
        values = torch.from_file(self.file, shared=False, size=self.positions * self.hidden, dtype=self.dtype)
        self._values = values.view(self.positions, self.hidden)

    def _write(self, file: BinaryIO, examples: Sequence[Example], states: torch.Tensor) -> None:
        """The states of these examples, in their order, (N, hidden); what follows them is of an example that does not count."""
        start = 0
        for example in examples:
            place = self._place(example)
            count = place.stop - place.start
            file.seek(place.start * self.hidden * self.dtype.itemsize)
            file.write(states[start : start + count].contiguous().view(torch.uint8).numpy())
            start += count

    def add_to(self, rows: SharedPrefixBatch, examples: Sequence[Example]) -> SharedPrefixBatch:
        """The rows of these examples, with the reference's states."""
        return rows.with_reference(torch.cat([self._values[self._place(example)] for example in examples]))

    def _place(self, example: Example) -> slice:
        index = self.split.index(example)
        return slice(int(self.stop[index] - self.counts[index]), int(self.stop[index]))


def _size(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def _existing_parent(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "."
    return path


def _extend(descriptor: int, _: int, size: int) -> None:
    os.truncate(descriptor, size)
