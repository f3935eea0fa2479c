"""What a check of the GPU path leaves: gpu.jsonl row by row, and at the end gpu.json and gpu.md."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_stages.rows import FAILED, OK, Check, Measurement, Row

MOST = 11_800  # characters of gpu.md, so that it can be printed where output is cut
VERSIONS = "python torch transformers triton cuda cudnn hydra-core omegaconf datasets pydantic peft bitsandbytes accelerate trl".split()


class Outcome(NamedTuple):
    """How a stage has ended."""

    stage: str
    state: str  # ok, failed or skipped
    detail: str  # reason; empty if it is ok
    seconds: float


class Report:
    """The rows of all stages.

    Args:
        folder: an existing folder, in which files of an earlier check are replaced.
        facts: of the machine and the check, for the beginning of the report.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.folder, self.facts = folder, dict(facts)
        self.rows: list[tuple[str, Row]] = []
        self.outcomes: list[Outcome] = []
        self._lines = open(folder / "gpu.jsonl", "w")  # noqa: SIM115 (open until `finish`)

    def add(self, stage: str, row: Row) -> None:
        """Add a row of a stage, and write it at once."""
        self.rows.append((stage, row))
        self._write({"stage": stage, "kind": type(row).__name__.lower(), **row._asdict()})

    def end(self, outcome: Outcome) -> None:
        """Note how a stage has ended."""
        self.outcomes.append(outcome)
        self._write({"kind": "stage", **outcome._asdict()})

    def _write(self, line: Mapping[str, Any]) -> None:
        print(json.dumps(line, default=str), file=self._lines, flush=True)

    @property
    def failed(self) -> bool:
        """Whether a stage has failed."""
        return any(outcome.state == FAILED for outcome in self.outcomes)

    def checks_of(self, stage: str) -> list[Check]:
        """Return the checks of a stage."""
        return [row for name, row in self.rows if name == stage and isinstance(row, Check)]

    def finish(self) -> str:
        """Write gpu.json and gpu.md, and return the Markdown."""
        self._lines.close()
        measured = [{"stage": stage, **row._asdict()} for stage, row in self.rows if isinstance(row, Measurement)]
        checks = [{"stage": stage, **row._asdict()} for stage, row in self.rows if isinstance(row, Check)]
        whole = {**self.facts, "stages": [outcome._asdict() for outcome in self.outcomes], "checks": checks, "rows": measured}
        (self.folder / "gpu.json").write_text(json.dumps(whole, indent=1, default=str) + "\n")
        text = next((text for most in (160, 80, 40, 0) if len(text := self._markdown(most)) <= MOST), None) or self._cut(self._markdown(0))
        (self.folder / "gpu.md").write_text(text)
        return text

    @staticmethod
    def _cut(text: str) -> str:
        """Return the lines of a text that fit."""
        return text[:MOST].rpartition("\n")[0] + "\n\nThe rest is in gpu.json.\n"

    def _markdown(self, most: int) -> str:
        """Return the report. `most`: characters of the detail of a check that is ok; 0: such checks are counted, not listed."""
        versions = ", ".join(f"{name} {self.facts[name]}" for name in VERSIONS if name in self.facts)
        parts = [f"# GPU check: {self.facts.get('card', 'unknown card')}, {self.facts.get('date', '')}", f"{versions}."]
        ends = [{"stage": o.stage, "state": _shown(o.state), "s": f"{o.seconds:.1f}", "reason": o.detail} for o in self.outcomes]
        parts.append(_table(ends))
        listed = [(stage, row) for stage, row in self.rows if isinstance(row, Check) and (most or row.state != OK)]
        details = [row.detail[: most if row.state == OK else 160] for _, row in listed]
        checks = [{"stage": s, "check": row.name, "state": _shown(row.state), "detail": d} for (s, row), d in zip(listed, details)]
        parts += ["## Checks" if most else "## Checks that failed or were skipped", _table(checks)]
        tables: dict[str, list[Mapping[str, Any]]] = {}
        for _, row in self.rows:
            if isinstance(row, Measurement) and row.table != "machine":  # which is in the first lines
                tables.setdefault(row.table, []).append(row.values)
        for name, lines in tables.items():
            parts += [f"## {name[0].upper()}{name[1:]}", _table(lines)]
        return "\n\n".join(part for part in parts if part) + "\n"


def _shown(state: str) -> str:
    return "**FAILED**" if state == FAILED else state


def _table(lines: list[Mapping[str, Any]]) -> str:
    """Return a Markdown table with the columns of all lines."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    rows = [columns, ["---"] * len(columns), *([str(line.get(column, "")).replace("|", "/") for column in columns] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if lines else ""
