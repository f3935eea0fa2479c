"""A file of JSON lines that is written batch by batch, and gone on with where it was interrupted."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from tdpo.analysis.trained_models import check_writable
from tdpo.utils import RunError, UserError, try_lock


class ResumableJsonl:
    """Rows in a file; beside it, in <out>.settings.json, what they depend on. No other process writes it while it is entered.

    Args:
        out: the file, new, or one that this class has begun.
        identity: what the rows depend on, as JSON.
        rows_of_batch: how many rows each batch has.
    """

    def __init__(self, out: str, identity: Mapping[str, Any], rows_of_batch: Sequence[int]):
        self.out, self.identity, self.rows_of_batch = out, dict(identity), rows_of_batch
        self.beside = f"{out}.settings.json"

    def __enter__(self) -> "ResumableJsonl":
        """Cut the file back to whole batches; `done` is their number.

        Raises:
            UserError: the file is of other settings, or of none; another process writes it; or it cannot be written.
        """
        check_writable(self.beside)
        if os.path.exists(self.out) and os.path.getsize(self.out) and not os.path.getsize(self.beside):
            os.remove(self.beside)
            raise UserError(f"out={self.out} exists, and is none that sample.py has begun: choose another file")
        self.settings = open(self.beside, "r+")  # noqa: SIM115 (closed by __exit__)
        try:
            self.done = self._go_on()
        except BaseException:
            self.settings.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.settings.close()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows behind those that are there.

        Raises:
            RunError: they cannot be written.
        """
        try:
            with open(self.out, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise RunError(f"out={self.out} cannot be written: {error}; the same command goes on from here") from None

    def _go_on(self) -> int:
        if not try_lock(self.settings.fileno()):
            raise UserError(f"out={self.out}: another process writes it: wait for it, or choose another file")
        check_writable(self.out)
        if not os.path.getsize(self.out):
            self.settings.truncate(0)
            json.dump(self.identity, self.settings, indent=1)
            self.settings.flush()
            return 0
        before = None
        with suppress(ValueError):
            before = json.load(self.settings)
        if not isinstance(before, dict):
            raise UserError(f"{self.beside} cannot be read, so what {self.out} depends on is not known: choose another file")
        if differing := sorted(key for key in {*before, *self.identity} if before.get(key) != self.identity.get(key)):
            raise UserError(f"out={self.out} was begun with another {', '.join(differing)}: choose another file")
        with open(self.out, "rb+") as file:
            return self._cut_to_whole_batches(file)

    def _cut_to_whole_batches(self, file: BinaryIO) -> int:
        ends = [end for end, whole in _lines(file) if whole]
        done = rows = 0
        while done < len(self.rows_of_batch) and rows + self.rows_of_batch[done] <= len(ends):
            rows, done = rows + self.rows_of_batch[done], done + 1
        file.truncate(ends[rows - 1] if rows else 0)
        return done


def _lines(file: BinaryIO) -> Iterator[tuple[int, bool]]:
    """Where each line ends, in bytes, and whether it does."""
    end = 0
    for line in file:
        end += len(line)
        yield end, line.endswith(b"\n")
