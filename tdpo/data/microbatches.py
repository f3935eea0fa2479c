"""How a batch is cut into microbatches of about equal cost. This file imports nothing but Python's library."""

import bisect
from collections.abc import Sequence
from typing import Optional


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
