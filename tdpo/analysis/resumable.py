"""A file of JSON lines that is written in batches and can be resumed after an interruption."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from tdpo.analysis.trained_models import check_writable
from tdpo.files import append_lines, reason_of
from tdpo.utils import RunError, UserError, try_lock


class ResumableJsonl:
    """A context manager for the file. <out>.settings.json records what the rows depend on; a lock on it keeps other processes out.

    Args:
        out: the file: a new one, or one that this class has started.
        identity: everything that determines the rows, JSON-serializable.
        rows_of_batch: number of rows of each batch.
    """

    def __init__(self, out: str, identity: Mapping[str, Any], rows_of_batch: Sequence[int]):
        self.out, self.identity, self.rows_of_batch = out, dict(identity), rows_of_batch
        self.settings_path = f"{out}.settings.json"

    def __enter__(self) -> "ResumableJsonl":
        """Open the file and drop an incomplete last batch; `done` is the number of complete batches.

        Raises:
            UserError: the file has other or no settings, another process is writing it, or it cannot be written.
        """
        check_writable(self.settings_path)
        if os.path.exists(self.out) and os.path.getsize(self.out) and not os.path.getsize(self.settings_path):
            os.remove(self.settings_path)
            raise UserError(f"out={self.out} exists but was not written by sample.py: give out=<another file>")
        self.settings = open(self.settings_path, "r+")  # noqa: SIM115 (closed by __exit__)
        try:
            self.done = self._resume()
        except BaseException:
            self.settings.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.settings.close()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows to the file.

        Args:
            rows: the rows of one or more batches.

        Raises:
            RunError: the file cannot be written.
        """
        try:
            append_lines(self.out, rows)
        except OSError as error:
            raise RunError(f"out={self.out} cannot be written: {reason_of(error)}; run the same command again to resume") from None

    def _resume(self) -> int:
        if not try_lock(self.settings.fileno()):
            raise UserError(f"out={self.out} is being written by another process: wait for it to end, or give out=<another file>")
        check_writable(self.out)
        if not os.path.getsize(self.out):
            self.settings.truncate(0)
            json.dump(self.identity, self.settings, indent=1)
            self.settings.flush()
            return 0
        before = None
        with suppress(ValueError, RecursionError):
            before = json.load(self.settings)
        if not isinstance(before, dict):
            raise UserError(f"'{self.settings_path}' cannot be read, so the settings of '{self.out}' are unknown: give out=<another file>")
        if differing := sorted(key for key in {*before, *self.identity} if before.get(key) != self.identity.get(key)):
            raise UserError(f"out={self.out} was started with different settings ({', '.join(differing)}): give out=<another file>")
        with open(self.out, "rb+") as file:
            return self._cut_to_whole_batches(file)

    def _cut_to_whole_batches(self, file: BinaryIO) -> int:
        """Truncate the file to its complete batches and return their number."""
        ends = [end for end, whole in _lines(file) if whole]
        done = rows = 0
        while done < len(self.rows_of_batch) and rows + self.rows_of_batch[done] <= len(ends):
            rows, done = rows + self.rows_of_batch[done], done + 1
        file.truncate(ends[rows - 1] if rows else 0)
        return done


def _lines(file: BinaryIO) -> Iterator[tuple[int, bool]]:
    """Yield for each line the byte offset of its end, and whether it ends with a newline (an interrupted write leaves none)."""
    end = 0
    for line in file:
        end += len(line)
        yield end, line.endswith(b"\n")
