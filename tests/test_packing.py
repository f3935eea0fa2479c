"""Rows that hold several examples: their width, what of them is used, and how they are dealt to microbatches and ranks."""

import random

import pytest
from helpers import ROOT

from tdpo import microbatches as packing_module
from tdpo.microbatches import Packing, attention_cost, cut_into_microbatches, cut_into_rows, pack

PYTHIA = Packing(attention_cost(2560), 1024)
# Of benchmarks/hh_lengths.txt: prompt, chosen and rejected tokens; the last token of a response is not computed.
LINES = [line for line in (ROOT / "benchmarks" / "hh_lengths.txt").read_text().splitlines() if not line.startswith("#")]
HH = [a + b + c - 2 for a, b, c in (map(int, part.split("-")) for line in LINES for part in line.split())]


def width(lengths, rows) -> int:
    return max(sum(lengths[i] for i in row) for row in rows)


def shares(lengths, rounds) -> tuple[float, float]:
    """Return the useful share of all computed tokens, and of the work of the rank that computes most."""
    by_rank = [0] * len(rounds[0])
    for microbatches in rounds:
        for rank, rows in enumerate(microbatches):
            by_rank[rank] += len(rows) * width(lengths, rows) if rows else 0
    return sum(lengths) / sum(by_rank), sum(lengths) / len(by_rank) / max(by_rank)


@pytest.mark.parametrize("batch,ranks,microbatches", [(32, 1, 4), (64, 1, 2), (64, 1, 8), (64, 8, 1), (128, 8, 1)])
def test_what_is_computed_of_hh_pairs_is_needed(batch, ranks, microbatches):
    """At least 95 % of all computed tokens, and 93 % of the slowest rank's. One example a row: 60 to 88 %."""
    batches = [[HH[(start + i) % len(HH)] for i in range(batch)] for start in range(0, len(HH), batch)]
    found = [shares(lengths, cut_into_rows(lengths, ranks, microbatches, PYTHIA)) for lengths in batches]
    assert min(share for share, _ in found) >= 0.95 and min(slowest for _, slowest in found) >= 0.93, found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ranks,microbatches,budget", [(1, 1, None), (3, 2, None), (2, 1, 300), (1, 1, 40), (4, 1, 2000)])
@pytest.mark.parametrize("hidden", [16, 4096])
def test_every_example_is_in_one_row(seed, ranks, microbatches, budget, hidden):
    """All rounds are complete; microbatches are within the budget, or hold one row as wide as the longest example."""
    numbers = random.Random(seed)
    lengths = [numbers.randint(1, numbers.choice([8, 60, 200])) for _ in range(numbers.randint(1, 40))]
    packing = Packing(attention_cost(hidden), 150)
    rounds = cut_into_rows(lengths, ranks, microbatches, packing, budget)
    assert sorted(i for round in rounds for rows in round for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(round) == ranks for round in rounds) and all(any(round) for round in rounds)
    assert budget is not None or len(rounds) <= microbatches
    for rows in (rows for round in rounds for rows in round if rows):
        assert all(rows) and width(lengths, rows) <= max(150, max(lengths))
        if budget is not None:
            assert len(rows) * width(lengths, rows) <= max(budget, max(lengths))
    for round in rounds:  # ranks do equal work: a rank has at most one row less than another
        counts = [len(rows) for rows in round]
        assert max(counts) - min(counts) <= 1
        assert min(counts) > 0 or len(lengths) < ranks * len(rounds)


def test_rows_are_no_wider_where_attention_costs_more():
    lengths = HH[:64]
    wide, narrow = (width(lengths, pack(lengths, Packing(attention, 4096))) for attention in (1e-6, 1.0))
    assert narrow <= 1.02 * max(lengths) < wide


def test_attention_is_counted_in_the_choice():
    """With a small model, for which attention is expensive, rounds of similar lengths cost less than rounds that are alike."""
    lengths = HH[:64]
    small, large = (cut_into_rows(lengths, 1, 8, Packing(attention_cost(hidden), 1024)) for hidden in (64, 8192))
    widths = [[width(lengths, rows) for (rows,) in rounds] for rounds in (small, large)]
    assert widths[0][-1] < 0.5 * widths[0][0] and widths[1][-1] > 0.9 * widths[1][0]


def test_packing_computes_less_than_one_example_a_row():
    lengths = HH[:64]
    alone = sum(len(part) * max(lengths[i] for i in part) for (part,) in cut_into_microbatches(lengths, 1, 2))
    packed = sum(len(rows) * width(lengths, rows) for (rows,) in cut_into_rows(lengths, 1, 2, PYTHIA))
    assert packed < 0.7 * alone


@pytest.mark.parametrize("case", ["equal", "short", "ones", "one long", "many"])
def test_large_batches_are_cut_with_few_trials(case, monkeypatch):
    """Batches are cut in Python while a step runs: each example may be put into a row only some hundred times, whatever the batch."""
    numbers, placed = random.Random(0), []
    lengths = {
        "equal": [100] * 512,
        "short": [numbers.randint(50, 100) for _ in range(512)],
        "ones": [1] * 512,
        "one long": [1000] + [3] * 511,
        "many": [numbers.randint(50, 900) for _ in range(4096)],
    }[case]
    fit = packing_module._best_fit
    monkeypatch.setattr(packing_module, "_best_fit", lambda *arguments: placed.append(len(arguments[1])) or fit(*arguments))
    for ranks, cuts, budget in ((1, 1, None), (8, 4, None), (1, 1, 2000)):
        placed.clear()
        rounds = cut_into_rows(lengths, ranks, cuts, Packing(attention_cost(768), 1024), budget)
        assert sorted(i for round in rounds for rows in round for row in rows for i in row) == list(range(len(lengths)))
        assert sum(placed) <= 700 * len(lengths)
