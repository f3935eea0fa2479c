"""Rows in which a prompt stands once, with its responses beside each other, and the attention that keeps those apart.

Shapes: B rows (prompts), R responses each, T tokens of the longest row, N response tokens of all rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Optional, Union

import numpy as np
import torch

LAYER_TYPES = {"full_attention", "sliding_attention"}  # of a Transformers config, that a mask can express


@dataclass(frozen=True)
class SharedPrefixBatch:
    """[prompt | response | response ...], padded on the right.

    The last token of each response is left out: it predicts nothing. A response's first token is predicted from the prompt's last one,
    which therefore stands in `states` once a response.
    """

    input_ids: torch.Tensor  # (B, T)
    position_ids: torch.Tensor  # (B, T): those of a response go on from the prompt's end
    segments: torch.Tensor  # (B, T): 0 the prompt, 1 ... R a response, -1 padding
    states: torch.Tensor  # (N,): b * T + t of the positions that predict a response token, row by row, response by response
    labels: torch.Tensor  # (N,): the tokens that they predict
    responses: torch.Tensor  # (N,): b * R + r
    num_tokens: torch.Tensor  # (B, R): response tokens
    counts: tuple[int, ...]  # response tokens of each row, for who must know them without waiting for the device
    reference_states: Optional[torch.Tensor] = None  # (N, H): the reference's hidden states at `states`, where they are known already
    annotations: Optional[torch.Tensor] = None  # (B, R), float64: what the data says of each response
    baseline: Optional[torch.Tensor] = None  # z0 of kto, a scalar, nats

    def to(self, device: torch.device) -> "SharedPrefixBatch":
        """On a device; without waiting for it where the tensors are in pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "SharedPrefixBatch":
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function) -> "SharedPrefixBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, torch.Tensor)})

    def with_reference(self, states: torch.Tensor) -> "SharedPrefixBatch":
        return replace(self, reference_states=states)

    def visible(self, window: Optional[int] = None) -> torch.Tensor:
        """(B, T, T), bool: what each position attends to. Itself, what comes before it in its own response, and the prompt.

        Args:
            window: of sliding attention: no further back than window - 1 positions.
        """
        steps = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        seen, own = self.segments[:, None, :], self.segments[:, :, None]
        visible = (steps[:, None] >= steps) & ((seen == 0) | (seen == own))
        if window is not None:
            visible &= self.position_ids[:, :, None] - self.position_ids[:, None, :] < window
        return visible


def shared_prefix_batch(examples: Sequence[tuple]) -> SharedPrefixBatch:
    """Put each example into a row.

    Args:
        examples: (prompt, responses[, masks[, annotations]]) each, as data.split.TokenizedExample. Prompt and responses are token ids, none
            empty, and every example has the same number of responses. masks: of each response, 1 for the tokens in the loss; None: all are.
            annotations: what the data says of each response; none at all if an example has none.

    shared_prefix_batch([([5, 6], [[7, 8], [9]])]): input_ids [[5, 6, 7]], states [1, 2, 1], labels [7, 8, 9].
    """
    rows = [example[:2] for example in examples]
    masks = [example[2] if len(example) > 2 else None for example in examples]
    annotations = [example[3] if len(example) > 3 else () for example in examples]
    lengths = [len(prompt) + sum(len(response) - 1 for response in responses) for prompt, responses in rows]
    shape = len(rows), max(lengths)
    input_ids, position_ids, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1)
    states, labels, owners, num_tokens = [], [], [], np.zeros((len(rows), len(rows[0][1])), np.int64)
    for b, (prompt, responses) in enumerate(rows):
        n = end = len(prompt)
        input_ids[b, :n], position_ids[b, :n], segments[b, :n] = prompt, np.arange(n), 0
        for r, response in enumerate(responses):
            start, end = end, end + len(response) - 1
            input_ids[b, start:end], position_ids[b, start:end], segments[b, start:end] = (
                response[:-1],
                np.arange(n, n + end - start),
                r + 1,
            )
            keep = slice(None) if masks[b] is None else np.array(masks[b][r], bool)
            labels.append(np.array(response)[keep])
            states.append(b * shape[1] + np.concatenate([[n - 1], np.arange(start, end)])[keep])
            num_tokens[b, r] = len(labels[-1])
            owners.append(np.full(num_tokens[b, r], b * len(responses) + r))
    tensors = (input_ids, position_ids, segments, *(np.concatenate(parts).astype(np.int64) for parts in (states, labels, owners)))
    return SharedPrefixBatch(
        *map(torch.from_numpy, tensors),
        torch.from_numpy(num_tokens),
        tuple(num_tokens.sum(-1).tolist()),
        annotations=torch.tensor(annotations, dtype=torch.float64) if all(annotations) else None,
    )


def sliding_window(config) -> Optional[int]:
    """The smallest window of a Transformers config, tokens; None where all attention is full."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return None if kinds and "sliding_attention" not in kinds else getattr(config, "sliding_window", None)


def attention_masks(rows: SharedPrefixBatch, config) -> Union[torch.Tensor, Mapping[str, torch.Tensor]]:
    """What a Transformers model takes as `attention_mask`, so that it attends as `visible` says.

    Args:
        config: the model's. Where it has layers of several kinds, the mask is one by kind.

    Returns:
        (B, 1, T, T) a mask, in the form that the model's attention implementation wants.
    """
    form = FORMS[config._attn_implementation]
    text = config.get_text_config()
    kinds, window = set(getattr(text, "layer_types", None) or ()), sliding_window(config)
    if not kinds:
        return form(rows, window)
    windows = {"full_attention": None, "sliding_attention": window}
    return {kind: form(rows, windows[kind]) for kind in sorted(kinds)}


def _boolean(rows: SharedPrefixBatch, window: Optional[int]) -> torch.Tensor:
    return rows.visible(window).unsqueeze(1)


def _additive(rows: SharedPrefixBatch, window: Optional[int]) -> torch.Tensor:
    """0 or the lowest float32, for attention that adds the mask to its weights."""
    visible = rows.visible(window).unsqueeze(1)
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, torch.finfo(torch.float32).min)


def _blocks(rows: SharedPrefixBatch, window: Optional[int]):
    """For FlexAttention, which skips blocks in which nothing is visible."""
    from torch.nn.attention.flex_attention import create_block_mask  # here, because importing it takes a second

    segments, positions = rows.segments, rows.position_ids
    batch, length = segments.shape

    def visible(b, _, query, key):
        same = (segments[b, key] == 0) | (segments[b, key] == segments[b, query])
        near = positions[b, query] - positions[b, key] < (window or length)
        return (query >= key) & same & near

    return create_block_mask(visible, batch, None, length, length, device=segments.device)


# By attention implementation of Transformers. FlashAttention takes no mask that could say this.
FORMS = {"sdpa": _boolean, "eager": _additive, "flex_attention": _blocks}


def unsupported_attention(config) -> Optional[str]:
    """Why a model of this Transformers config cannot be given such rows; None where nothing is known against it."""
    unknown = set(getattr(config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        return f"it has layers of {', '.join(sorted(unknown))}"
    if config._attn_implementation not in FORMS:
        return f"{config._attn_implementation} takes no mask for such rows"
    return None
