"""Data rows of a preference dataset, and what is wrong with them.

All defects of a source are collected and reported together, with file and row number, before any model is loaded.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional

from tdpo.utils import UserError, plural, some_of


class Row:
    """One data row. `number` counts from 1 within `source` (in JSON lines, the line number); an unreadable row has no `fields`."""

    def __init__(self, source: str, number: int, fields: Optional[Mapping[str, Any]], defect: Optional[str] = None):
        self.source, self.number, self.fields, self.defect = source, number, fields, defect


class RowReport:
    """Collects the defects of a dataset's rows, applies `invalid_rows` to them, and reports them at the end.

    error: any defect ends the run, and all are listed. skip: rows with a defect are dropped and counted. keep: rows with an empty text,
    different prompts or equal responses are trained on, as in the published code, and counted; a row that cannot be trained on (a field
    or marker is missing, a value is not text, broken JSON, special tokens in text) is still an error.

    Args:
        name, split: of the dataset.
        invalid_rows: error, skip or keep.
        special_tokens: strings that the tokenizer would turn into special tokens; a text that holds one is a defect.
        takes_rendered: whether the dataset has the key `rendered`, a remedy for them.
    """

    def __init__(self, name: str, split: str, invalid_rows: str, special_tokens: Sequence[str] = (), takes_rendered: bool = False):
        self.takes_rendered = takes_rendered
        self.name, self.source, self.invalid_rows = name, f"{name} {split}", invalid_rows
        self.read = self.kept = self.rendered = 0  # rows; rendered: by a chat template
        self.left_out: Counter[str] = Counter()  # rows of which the template leaves out or changes something, by key of a message
        self.other_prompts = 0  # conversations that do not contain the prompt in the row's own field
        self.fields: set[str] = set()  # names of the fields of all rows
        self.notes: list[str] = []  # logged with the counts
        self._defects: dict[str, list[Row]] = defaultdict(list)
        self._kept_defects: dict[str, list[Row]] = defaultdict(list)
        self._special = re.compile("|".join(re.escape(x) for x in special_tokens if x)) if any(special_tokens) else None

    def rows(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the readable rows; the others are noted as defects."""
        for row in rows:
            self.read += 1
            self.fields.update(row.fields or ())
            if row.fields is None:
                self.refuse(row, row.defect)
            else:
                yield row

    def times(self, defect: str) -> int:
        """Return how many rows have this defect so far."""
        return len(self._defects.get(defect, ()))

    def refuse(self, row: Row, defect: str) -> None:
        """Note a defect that makes a row unusable."""
        if row not in self._defects[defect][-1:]:
            self._defects[defect].append(row)

    def texts(self, row: Row, *names: str) -> Optional[list[str]]:
        """Return the named fields if all of them are usable text, else None; defects are noted."""
        values = []
        for name in names:
            if name not in row.fields:
                self.refuse(row, self.no_field(row, name))
            elif self.is_text(row, name, row.fields[name]):
                values.append(row.fields[name])
        return values if len(values) == len(names) else None

    def no_field(self, row: Row, name: str) -> str:
        """Return the defect of a row that lacks a field, with what it has."""
        key = f"; datasets.{self.name}.columns gives other names" if self.takes_rendered else ""
        return f"no field {name!r} (it has {', '.join(row.fields)}{key})"

    def is_text(self, row: Row, name: str, value: Any, special: Optional[re.Pattern] = None) -> bool:
        """Whether a value is a string that the tokenizer reads as plain text; if not, the defect is noted.

        Args:
            row, name: where the value is from.
            value: to be checked.
            special: finds the special tokens that the text may not hold; None: all.
        """
        if not isinstance(value, str):
            self.refuse(row, f"{name!r} is {'null' if value is None else type(value).__name__}, not text")
        elif not _encodable(value):
            self.refuse(row, f"{name!r} holds a lone surrogate")
        elif self._special is not None and (found := (special or self._special).search(value)):
            self.refuse(row, f"special token {found.group()!r} inside {name!r}")
        else:
            return True
        return False

    def usable_pair(
        self, row: Row, prompt: str, chosen: str, rejected: str, same_prompt: bool = True, equal: Optional[bool] = None
    ) -> bool:
        """Whether to train on this pair; notes its defects, and counts its row if it is kept.

        Args:
            row: where the pair is from.
            prompt, chosen, rejected: texts for which `is_text` holds.
            same_prompt: whether rejected has the prompt of chosen.
            equal: whether both responses are trained on as the same text; None: if they are equal.
        """
        defects = _empty(prompt=prompt, chosen=chosen, rejected=rejected)
        if not same_prompt:
            defects.append("chosen and rejected have different prompts")
        elif (chosen == rejected if equal is None else equal) and not defects:
            defects.append("chosen and rejected are equal" + ("" if chosen == rejected else " as the chat template renders them"))
        return self._keep(row, defects)

    def usable_answers(self, row: Row, prompt: str, answers: Sequence[str]) -> bool:
        """Whether to train on a row with one or more answers; otherwise as `usable_pair`."""
        return self._keep(row, _empty(prompt=prompt, answer=min(answers, key=lambda text: len(text.strip()))))

    def _keep(self, row: Row, defects: list[str]) -> bool:
        for defect in defects:
            (self._kept_defects if self.invalid_rows == "keep" else self._defects)[defect].append(row)
        keep = not defects or self.invalid_rows == "keep"
        self.kept += keep
        return keep

    def remedy(self) -> str:
        """Return the overrides that accept or drop the defective rows; '' if there are none."""
        key = f"datasets.{self.name}"
        remedies = [f"{key}.invalid_rows=skip drops such rows"] if self.kept else []
        special = [row for defect, rows in self._defects.items() if defect.startswith("special token") for row in rows]
        if special:
            remedies.append(f"{key}.escape_special_tokens=true makes special tokens plain text")
            chat = any(isinstance(value, (list, Mapping)) for row in special for value in (row.fields or {}).values())
            if self.takes_rendered and not chat:
                remedies.append(f"{key}.rendered=true takes them as the special tokens that they name")
        return "; ".join(remedies)

    def finish(self, remedy: Optional[str] = None) -> list[str]:
        """Return the counts and notes, as lines to log.

        Args:
            remedy: last line of the error message; None names the config keys that help.

        Raises:
            UserError: there are rows that cannot be used, all of which are listed, or no rows are left.
        """
        if self._defects and self.invalid_rows != "skip":
            remedy = self.remedy() if remedy is None else remedy
            end = f"\n  {remedy}" if remedy else ""
            raise UserError(f"{self.source}: rows that cannot be used{self._describe(self._defects)}{end}")
        if self.read == 0:
            raise UserError(f"{self.source}: no rows")
        if self.kept == 0:
            raise UserError(f"{self.source}: none of {plural(self.read, 'row')} can be used{self._describe(self._defects)}")
        lines = ["; ".join([f"{self.source}: {plural(self.read, 'row')} read, {self.kept:,} kept", *self.notes])]
        if self.left_out:
            what = ", ".join(f"{key} of {plural(count, 'row')}" for key, count in sorted(self.left_out.items()))
            lines.append(f"  the chat template leaves out or changes: {what}")
        if self.other_prompts:
            lines.append(f"  {plural(self.other_prompts, 'conversation')} without the text in the row's prompt, which is not read")
        for verb, defects in (("dropped", self._defects), ("kept, as in the published code, despite", self._kept_defects)):
            if defects:
                lines.append(f"  {verb}{self._describe(defects)}")
        return lines

    @staticmethod
    def _describe(defects: Mapping[str, list[Row]]) -> str:
        """Return a line per defect, '  empty chosen: train.jsonl rows 3, 7', with at most a dozen row numbers."""
        parts = []
        for defect, rows in defects.items():
            by_source: dict[str, list[int]] = defaultdict(list)
            for row in rows:
                by_source[row.source].append(row.number)
            places = ", ".join(f"{source} row{'s' if len(n) > 1 else ''} {some_of(n)}" for source, n in by_source.items())
            parts.append(f"\n  {defect}: {places}")
        return "".join(parts)


def _empty(**texts: str) -> list[str]:
    return [f"empty {name}" for name, text in texts.items() if not text.strip()]


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
