"""An example as it is trained on: its tokens decoded, with what is in the loss marked."""

from collections.abc import Sequence
from itertools import groupby

from tdpo.data.split import Example, TokenizedSplit

OPEN, CLOSE = "⟦", "⟧"  # around what is in the loss


def preview(split: TokenizedSplit, tokenizer) -> str:
    """Return the first example of the data, one paragraph for each of its responses after the prompt.

    Args:
        split: the data.
        tokenizer: decodes the tokens.
    """
    example = Example(0, 0)
    name, found = split.element(example)["example_id"], split.example(example)
    parts = [f"example {name}; {OPEN}...{CLOSE} is in the loss"]
    for role, response, count in zip(split.form.roles, found.responses, found.counts()):
        mask = [1] * len(response) if found.masks is None else found.masks[split.form.roles.index(role)]
        text = marked(tokenizer, [*found.prompt, *response], [0] * len(found.prompt) + list(mask))
        lines = "\n".join(f"  | {line}" for line in text.split("\n"))
        parts.append(f"{role}: {len(found.prompt)} tokens of prompt and {len(response)} of response, {count} in the loss\n{lines}")
    return "\n".join(parts)


def marked(tokenizer, ids: Sequence[int], mask: Sequence[int]) -> str:
    """Decode tokens, with marks around those in the loss.

    Args:
        tokenizer: of Transformers.
        ids: token ids.
        mask: 1 for a token in the loss, else 0.
    """
    pieces, stop, before = [], 0, ""
    for in_loss, group in groupby(mask):
        stop += len(list(group))
        text = tokenizer.decode(list(ids[:stop]))
        piece = text.removeprefix(before)  # in context, because some tokenizers write spaces only between tokens
        pieces.append(OPEN + piece + CLOSE if in_loss else piece)
        before = text
    return "".join(pieces)
