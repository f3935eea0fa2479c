"""Committed results: the tables of the experiments' pages are those of results.json, and so is every figure with an interval."""

import json
import re
import sys
from collections.abc import Iterator

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT))

from experiments.frontier import tables  # noqa: E402
from experiments.hh import report  # noqa: E402
from tdpo.analysis.evaluation import Estimate  # noqa: E402

HERE = ROOT / "experiments"
FIGURE = re.compile(r"-?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]")
EXPERIMENTS = ["frontier", "smollm", "hh"]
PAGES = [
    *(ROOT / name for name in ("README.md", "docs/what-we-found.md", "docs/evaluation.md")),
    *(HERE / name / "README.md" for name in EXPERIMENTS),
]


def results_of(experiment: str) -> dict:
    """The committed results of an experiment."""
    return json.loads((HERE / experiment / "results.json").read_text())


def intervals_in(content) -> Iterator[dict]:
    """Every mean with an interval."""
    if isinstance(content, dict):
        if content.get("low") is not None:
            yield content
        else:
            for value in content.values():
                yield from intervals_in(value)


def written(found: dict) -> set[str]:
    """A mean with its interval in all forms that pages may use."""
    limits = found["mean"], found["low"], found["high"]
    shown = {f"{{:.{digits}f}} [{{:.{digits}f}}, {{:.{digits}f}}]".format(*limits) for digits in (1, 2, 3)}
    return shown | {str(Estimate(*limits, 0))}


def known(experiment: str) -> set[str]:
    """Every figure with an interval of an experiment's committed results."""
    results = [json.loads(file.read_text()) for file in (HERE / experiment).rglob("*.json")]
    return {text for content in results for value in intervals_in(content) for text in written(value)}


@pytest.mark.parametrize("experiment", ["frontier", "smollm"])
def test_the_tables_of_a_page_are_those_of_its_results(experiment):
    page = (HERE / experiment / "README.md").read_text()
    for table in tables.tables(results_of(experiment)):
        assert table in page, table.splitlines()[0]


@pytest.mark.parametrize("experiment", ["hh", "hh/float32/seed0", "hh/float32/seed1"])
def test_the_table_of_hh_is_that_of_its_results(experiment):
    assert (HERE / experiment / "table.md").read_text() == report.table_of(results_of(experiment)) + "\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_figure_with_an_interval_is_one_of_the_results(page):
    """On an experiment's page, of its own results."""
    figures, own = FIGURE.findall(page.read_text()), page.parent.name if page.parent.parent == HERE else None
    found = set().union(*(known(name) for name in EXPERIMENTS if own in (None, name)))
    assert figures and [figure for figure in figures if figure not in found] == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_results_have_seeds_numbers_and_intervals(experiment):
    results = results_of(experiment)
    methods = results["methods"] if experiment == "hh" else results["end"]
    assert len(methods) >= 5
    for method in methods.values():
        for found in method["measures"].values() if experiment == "hh" else method.values():
            assert found["n"] >= 2 and found["low"] <= found["mean"] <= found["high"]
        assert method["seeds"] if experiment == "hh" else all(found["seeds"] for found in method.values())


def test_the_tables_side_by_side_are_those_of_the_results():
    """Ratios of KL to DPO's."""
    text = (ROOT / "docs" / "what-we-found.md").read_text()
    header, _, *rows = re.search(r"^\| reward \| frontier: .*?\n\n", text, re.MULTILINE | re.DOTALL)[0].strip().splitlines()
    experiment, columns = "", []
    for cell in header.strip("|").split("|")[1:]:
        named, _, method = cell.strip().rpartition(": ")
        experiment = named or experiment
        columns.append((experiment, method))
    assert [name for name, _ in columns] == ["frontier"] * 4 + ["smollm"] * 4 and len(rows) == 8
    ratios = {name: results_of(name)["kl_over_dpo"] for name in ("frontier", "smollm")}
    for row in rows:
        level, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for (experiment, method), cell in zip(columns, cells):
            assert cell == tables.ratio(ratios[experiment][method].get(level)), (level, experiment, method)
