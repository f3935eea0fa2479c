"""The logs of a run, metrics.jsonl and samples.jsonl: read whatever they hold, and cut them back to a checkpoint."""

import json
import os
from collections.abc import Iterator
from typing import Optional

from tdpo.files import keep_copy, replaced_whole
from tdpo.utils import UserError, get_logger, plural

log = get_logger(__name__)

LOGS = ("metrics.jsonl", "samples.jsonl")
EXAMPLES = "counters/examples"


def read_metrics(path: str) -> tuple[list[dict], int]:
    """Return the entries of a metrics.jsonl, and the number of lines that are none: damaged, foreign, or not written to their end.

    An entry has split (train or eval), counters/examples, and metrics, which are numbers or, where not finite, None.

    Raises:
        UserError: the file cannot be read.
    """
    entries = [entry for _, entry in _lines(path)]
    found = [entry for entry in entries if entry is not None and entry.get("split") in ("train", "eval")]
    kept = [{name: value for name, value in entry.items() if name == "split" or _is_metric(value)} for entry in found]
    return kept, len(entries) - len(kept)


def _is_metric(value: object) -> bool:
    return value is None or isinstance(value, float) or _is_count(value)


def _is_count(value: object) -> bool:
    """Whether a value is an integer that a program can have counted; a larger one fits no floating-point number."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _lines(path: str) -> Iterator[tuple[bytes, Optional[dict]]]:
    """Yield each line that is not empty, with its entry or None."""
    try:
        with open(path, "rb") as handle:
            for line in handle:
                if line.strip():
                    yield line, _entry(line)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from None


def _entry(line: bytes) -> Optional[dict]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    return entry if _is_count(entry.get(EXAMPLES)) else None


def cut_back(path: str, examples: int, evaluated: bool) -> None:
    """Remove the entries of steps and evals that a resumed run will repeat, and a last line that was not written to its end.

    If other lines cannot be read, the file is first kept as <path>.old.

    Args:
        path: of the log; nothing is done if it does not exist.
        examples: train examples of the checkpoint.
        evaluated: whether the checkpoint's weights were evaluated before it was written.

    Raises:
        UserError: the file cannot be read.
    """
    if not os.path.lexists(path):
        return
    kept, unreadable, last_is_cut = [], 0, False
    for line, entry in _lines(path):
        last_is_cut = entry is None and not line.endswith(b"\n")
        unreadable += entry is None
        if entry is not None and entry[EXAMPLES] < examples + (evaluated or entry.get("split") == "train"):
            kept.append(line.rstrip(b"\n") + b"\n")
    if unreadable - last_is_cut:
        log.warning(f"{path}: {plural(unreadable, 'line')} cannot be read; the file is kept as {os.path.basename(path)}.old")
        keep_copy(path)  # not renamed: if this process is killed now, the entries must still be there
    with replaced_whole(path, "wb") as handle:
        handle.writelines(kept)
