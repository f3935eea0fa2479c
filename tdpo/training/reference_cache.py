"""The reference's hidden states at response positions, kept on disk for preference training of several epochs or several runs.

A hidden state takes hidden_size numbers, its logits vocab_size numbers. Therefore states are stored, and the head stays in memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import BinaryIO, Optional

import numpy as np
import torch
import tqdm
import transformers

from tdpo.data.split import Example, TokenizedSplit
from tdpo.distributed.world import World
from tdpo.files import digest_of_pieces, is_regular, own_name, reason_of, remove_left_behind, set_aside
from tdpo.scoring.prefix_sharing import SharedPrefixBatch
from tdpo.scoring.scorer import Scorer
from tdpo.utils import RunError, UserError, as_bytes, get_logger, plural, try_lock

log = get_logger(__name__)

DIGEST = 64  # bytes of the hash at the end of the file
FORMAT = 2  # version of the file's format, and of how states are computed
IRRELEVANT_KEYS = ("_name_or_path", "transformers_version", "dtype", "architectures")  # of a model's config: they do not affect states


def config_fingerprint(config: transformers.PreTrainedConfig) -> str:
    """Return a hash of what determines hidden states besides the weights: config, attention implementation, Transformers' version."""
    values = {key: value for key, value in config.to_dict().items() if key not in IRRELEVANT_KEYS}
    attention = config.get_text_config()._attn_implementation
    return hashlib.sha256(json.dumps([values, attention, transformers.__version__], sort_keys=True, default=str).encode()).hexdigest()


class ReferenceCache:
    """A file of (positions, hidden) numbers: for each example in turn, the positions in the loss of its responses, role by role.

    A hash of the numbers follows them, so that both are replaced together.

    Args:
        cache_dir: the user's cache folder.
        split: the split of the examples.
        examples: the examples that the run will use; repeated ones are stored once.
        hidden: numbers per state.
        dtype: of the states; the reference's.
        identity: what determines the states: fingerprints of the reference's weights and config.
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
        """Whether the file exists and holds what was written to it. Reads the whole file."""
        if not os.path.lexists(self.file):
            return False
        try:
            if is_regular(self.file) and os.path.getsize(self.file) == self.bytes + DIGEST:
                with open(self.file, "rb") as file:
                    file.seek(self.bytes)
                    expected = file.read()
                if digest_of_pieces(self.file, self.bytes, "Checking the reference cache").encode() == expected:
                    return True
        except OSError:
            pass
        log.warning(f"reference cache: {self.file} is damaged, or of an earlier version without a hash: it is replaced")
        return False

    def plan(self) -> str:
        """Return a line for the log: '96 examples, 2,912 positions x 32 numbers x 4 bytes = 0.4 MB in <file>; 12.3 GB are free'."""
        free = shutil.disk_usage(_existing_parent(self.file)).free
        return (
            f"{plural(self.n_examples, 'example')}, {self.positions:,} positions x {self.hidden} numbers x {self.dtype.itemsize} bytes = "
            f"{as_bytes(self.bytes)} in {self.file}; {as_bytes(free)} are free"
        )

    def fill(
        self, microbatches: Iterable, scorer: Scorer, world: World, check_stop: Callable[[], None], hide_progress: Optional[bool]
    ) -> None:
        """Compute the states and write them, all ranks into one file. After a signal or an error no file is left.

        Args:
            microbatches: this rank's; over all ranks they contain every example.
            scorer: holds the reference.
            world: the run's ranks.
            check_stop: raises Stopped if the run is to end; called once per microbatch.
            hide_progress: value for tqdm's `disable`.

        Raises:
            UserError: the file cannot be written, or a rank does not see it.
        """
        new = world.from_first(self._create)
        try:
            with world.agreed():
                self._check(new)
            # Written at file positions, not through a memory mapping, which several machines could not share.
            with open(new, "r+b", buffering=0) as file:
                for microbatch in tqdm.tqdm(microbatches, "Reference", unit=" microbatches", disable=hide_progress):
                    check_stop()
                    self._write(file, microbatch.examples, scorer.reference_states(microbatch.batch).to("cpu", self.dtype))
                os.fsync(file.fileno())
            world.gather(None)  # waits until all ranks have written
            world.from_first(lambda: self._publish(new))
        except OSError as error:
            raise RunError(f"reference_cache=true: {new} cannot be written ({reason_of(error)}); set local_dirs to another disk") from None
        finally:
            if world.is_first:
                os.close(self._lock)
                if os.path.exists(new):
                    os.remove(new)

    def _publish(self, new: str) -> None:
        """Add the hash to a complete file, and give the file its name."""
        digest = digest_of_pieces(new, self.bytes, "Hashing the reference cache")
        with open(new, "r+b") as file:
            file.seek(self.bytes)
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        if os.path.isdir(self.file):
            set_aside(self.file)
        os.replace(new, self.file)

    def _create(self) -> str:
        """Create a file of full size, and return its path. Its name is this run's own: another run may compute the same states now.

        Raises:
            UserError: the disk has too little space, or cannot be written.
        """
        folder = os.path.dirname(self.file)
        new = f"{self.file}.{own_name()}.new"
        try:
            os.makedirs(folder, exist_ok=True)
            remove_left_behind(f"{self.file}.", ".new")
            free = shutil.disk_usage(folder).free
            if free < self.bytes:
                raise UserError(
                    f"reference_cache=true needs {as_bytes(self.bytes)} in {folder}; {as_bytes(free)} are free\n"
                    "set local_dirs to a larger disk, or reference_cache=false"
                )
            with open(new, "wb") as file:
                self._lock = os.dup(file.fileno())
                try_lock(self._lock)
                (os.posix_fallocate if hasattr(os, "posix_fallocate") else _extend)(file.fileno(), 0, self.bytes + DIGEST)
        except OSError as error:
            if os.path.exists(new):
                os.remove(new)
            raise UserError(f"reference_cache=true: {new} cannot be written: {reason_of(error)}; set local_dirs to another disk") from None
        return new

    def _check(self, file: str) -> None:
        if not os.path.exists(file) or os.path.getsize(file) != self.bytes + DIGEST:
            raise UserError(f"reference_cache=true: this rank does not see {file}: local_dirs must name a disk that all ranks see")

    def open(self) -> None:
        """Map the file into memory.

        Raises:
            UserError: this rank does not see the file.
        """
        self._check(self.file)
        values = torch.from_file(self.file, shared=False, size=self.positions * self.hidden, dtype=self.dtype)
        self._values = values.view(self.positions, self.hidden)

    def _write(self, file: BinaryIO, examples: Sequence[Example], states: torch.Tensor) -> None:
        """Write the states (N, hidden) of these examples, in their order. States after theirs are a placeholder's, and are not written."""
        start = 0
        for example in examples:
            place = self._place(example)
            count = place.stop - place.start
            file.seek(place.start * self.hidden * self.dtype.itemsize)
            file.write(states[start : start + count].contiguous().view(torch.uint8).numpy())
            start += count

    def add_to(self, rows: SharedPrefixBatch, examples: Sequence[Example]) -> SharedPrefixBatch:
        """Return the rows with the reference's states. `examples` are those of the rows, in their order."""
        return rows.with_reference(torch.cat([self._values[self._place(example)] for example in examples]))

    def _place(self, example: Example) -> slice:
        """Return the positions of an example in the file."""
        index = self.split.index(example)
        return slice(int(self.stop[index] - self.counts[index]), int(self.stop[index]))


def _existing_parent(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "."
    return path


def _extend(descriptor: int, _: int, size: int) -> None:
    os.truncate(descriptor, size)
