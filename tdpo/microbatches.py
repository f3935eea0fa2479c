"""How a batch is cut into microbatches of about equal cost, and packed into rows. This file imports nothing but Python's library."""

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple, Optional

ATTENTION = 2  # what a FLOP of attention with a mask costs, in FLOPs of the other matrix products


def cut_into_microbatches(lengths: Sequence[int], ranks: int, microbatches: int, budget: Optional[int] = None) -> list[list[list[int]]]:
    """Cut a batch into rounds of microbatches, with one microbatch per rank in every round.

    Examples of similar length go together. Microbatches have about equal cost: number of examples times tokens of the longest one. The cut
    does not change the gradient, which is the sum over the batch's examples divided by their number.

    Args:
        lengths: number of tokens of each example, at least one example.
        ranks: number of ranks.
        microbatches: number of rounds if `budget` is None; fewer if there are too few examples.
        budget: largest cost of a microbatch, in tokens; a single longer example may exceed it.

    Returns:
        A list of rounds. A round has one microbatch per rank; each microbatch is a (possibly empty) list of indices into `lengths`.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def cut(limit: int) -> list[list[int]]:
        cuts: list[list[int]] = [[]]
        for i in order:
            if cuts[-1] and (len(cuts[-1]) + 1) * lengths[cuts[-1][0]] > limit:
                cuts.append([])
            cuts[-1].append(i)
        return cuts

    def cost(microbatch: list[int]) -> int:
        return len(microbatch) * lengths[microbatch[0]]

    wanted = ranks * (microbatches if budget is None else -(-len(cut(budget)) // ranks))
    limits = range(1, (budget or len(lengths) * lengths[order[0]]) + 1)
    # The smallest limit that gives at most `wanted` microbatches minimises the largest cost.
    cuts = cut(limits[bisect.bisect_left(limits, -wanted, key=lambda limit: -len(cut(limit)))])
    while len(cuts) < min(wanted, len(lengths)):
        largest = max((some for some in cuts if len(some) > 1), key=cost)
        cuts.remove(largest)
        cuts += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    cuts.sort(key=cost, reverse=True)
    cuts += [[]] * (-len(cuts) % ranks)
    return [cuts[i : i + ranks] for i in range(0, len(cuts), ranks)]


Rows = list[list[int]]  # the examples (indices) of each row of a microbatch


class Packing(NamedTuple):
    """How rows are made of examples.

    Args:
        attention: cost of a row's attention per token of its width, in costs of a token's other work, see `attention_cost`.
        most: tokens of the widest row, unless an example is longer.
    """

    attention: float
    most: int


def attention_cost(hidden: int) -> float:
    """Return the cost of attention per token of a row's width, in costs of a token's other work.

    A block has about 12 H^2 parameters, so that a token costs 24 H^2 FLOPs, and 4 H more for each token that its row has.

    Args:
        hidden: H, width of the model.
    """
    return ATTENTION / (6 * hidden)


def cut_into_rows(
    lengths: Sequence[int], ranks: int, microbatches: int, packing: Packing, budget: Optional[int] = None
) -> list[list[Rows]]:
    """Cut a batch into rounds of microbatches, with one microbatch per rank in every round, whose rows are filled with several examples.

    All rows of a round have about the same width, and all its microbatches the same number of rows, so that ranks do equal work. Either all
    rounds are alike, or each has examples of similar length: whichever costs less, attention included, which costs more in wider rows. The
    cut does not change the gradient.

    Args:
        lengths: number of tokens of each example, at least one example.
        ranks: number of ranks.
        microbatches: number of rounds if `budget` is None; fewer if there are too few examples.
        packing: what rows cost, and their largest width.
        budget: most tokens of a microbatch, padding included; a single longer example may exceed it.

    Returns:
        A list of rounds. A round has one microbatch per rank; each microbatch is a (possibly empty) list of rows.
    """
    if budget is None:
        return _best_rounds(lengths, ranks, min(microbatches, len(lengths)), packing, None)[0]
    rounds = max(1, -(-sum(lengths) // (ranks * budget)))
    while True:
        found, fits = _best_rounds(lengths, ranks, rounds, packing, budget)
        if fits or rounds >= len(lengths):
            return found
        rounds += 1


def pack(lengths: Sequence[int], packing: Packing) -> Rows:
    """Return the rows of one microbatch."""
    return cut_into_rows(lengths, 1, 1, packing)[0][0]


class _Filled(NamedTuple):
    """Rows of one width. `each`: rows of a microbatch; `cost`: of one microbatch."""

    rows: Rows
    each: int
    width: int
    cost: float


def _best_rounds(lengths: Sequence[int], ranks: int, rounds: int, packing: Packing, budget: Optional[int]) -> tuple[list[list[Rows]], bool]:
    """Return the cheaper of two cuts into `rounds` rounds, all alike or by length, and whether every microbatch is within the budget."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    alike = _fill(lengths, order, ranks * rounds, packing)
    total, groups, before = sum(lengths), [[] for _ in range(rounds)], 0
    for i in order:
        groups[before * rounds // total].append(i)
        before += lengths[i]
    by_length = [_fill(lengths, group, ranks, packing) for group in groups if group]

    def fits(filled: _Filled) -> bool:
        return budget is None or filled.each * filled.width <= max(budget, lengths[order[0]])

    complete = len(by_length) == rounds > 1 and all(len(each.rows) >= ranks and fits(each) for each in by_length)
    if complete and (sum(each.cost for each in by_length) < rounds * alike.cost or not fits(alike)):
        return [_dealt(filled, ranks, lengths) for filled in by_length], True
    dealt = _dealt(alike, ranks * rounds, lengths)
    return [round for i in range(0, len(dealt), ranks) if any(round := dealt[i : i + ranks])], fits(alike)


def _fill(lengths: Sequence[int], order: Sequence[int], microbatches: int, packing: Packing) -> _Filled:
    """Fill rows for several microbatches, each with the same number of rows, at the least cost.

    Args:
        lengths: of all examples.
        order: indices of those to fill in, the longest first.
        microbatches: their number.
        packing: what rows cost.
    """
    longest, total = lengths[order[0]], sum(lengths[i] for i in order)
    each, best = max(1, -(-total // (microbatches * max(packing.most, longest)))), None

    def cost(width: int) -> float:
        return each * width * (1 + packing.attention * width)

    while best is None or cost(longest) < best.cost:  # else more rows cost more, however narrow they are
        rows, width = _narrowest(lengths, order, each * microbatches)
        if (width <= max(packing.most, longest)) and (best is None or cost(width) < best.cost):
            best = _Filled(rows, each, width, cost(width))
        each = max(each + 1, int(1.1 * each))  # large batches have too many possibilities to try them all
    return best


def _narrowest(lengths: Sequence[int], order: Sequence[int], count: int) -> tuple[Rows, int]:
    """Return `count` rows, or one for each example if these are fewer, of the least width that best fit decreasing reaches (the algorithm
    MULTIFIT), and that width."""
    longest, total = lengths[order[0]], sum(lengths[i] for i in order)
    low, high = max(longest, -(-total // count)), max(longest, 2 * total // count + 1)  # two halves of rows always fit twice the mean
    rows = _best_fit(lengths, order, count, high)
    while rows is None:
        low, high = high, 2 * high
        rows = _best_fit(lengths, order, count, high)
    while high - low > low // 256:  # a search that is exact for small numbers, and within half a percent for others
        middle = (low + high) // 2
        found = _best_fit(lengths, order, count, middle)
        if found is None:
            low = middle + 1
        else:
            rows, high = found, middle
    fullest = [(-sum(lengths[i] for i in row), k) for k, row in enumerate(rows) if len(row) > 1]
    heapq.heapify(fullest)
    while len(rows) < min(count, len(order)):  # so that no microbatch is left without a row
        _, k = heapq.heappop(fullest)
        rows.append([rows[k].pop() for _ in range(len(rows[k]) // 2)])
        for half in (k, len(rows) - 1):
            if len(rows[half]) > 1:
                heapq.heappush(fullest, (-sum(lengths[i] for i in rows[half]), half))
    return rows, max(sum(lengths[i] for i in row) for row in rows)


def _best_fit(lengths: Sequence[int], order: Sequence[int], count: int, width: int) -> Optional[Rows]:
    """Put each example, the longest first, into the row that it fills best; None if that takes more than `count` rows."""
    rows: Rows = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in order:
        place = bisect.bisect_left(free, (lengths[i], -1))
        if place < len(free):
            left, row = free.pop(place)
        elif len(rows) < count:
            left, row = width, len(rows)
            rows.append([])
        else:
            return None
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def _dealt(filled: _Filled, microbatches: int, lengths: Sequence[int]) -> list[Rows]:
    """Deal rows to microbatches, the fullest first, always to the one with the fewest tokens that has room for a row."""
    dealt: list[Rows] = [[] for _ in range(microbatches)]
    tokens = [0] * microbatches
    fullest = sorted(filled.rows, key=lambda row: -sum(lengths[i] for i in row))
    for row in fullest:
        to = min((k for k in range(microbatches) if len(dealt[k]) < filled.each), key=tokens.__getitem__)
        dealt[to].append(row)
        tokens[to] += sum(lengths[i] for i in row)
    return dealt
