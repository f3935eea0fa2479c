"""Batches in which each prompt is computed once for all its responses, and the attention masks that keep the responses apart.

Shapes: B rows, E examples (prompts; a row may hold several), R responses per example, T tokens of the longest row, N response tokens of all
rows, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Optional, Union

import numpy as np
import torch

LAYER_TYPES = {"full_attention", "sliding_attention"}  # layer types of a Transformers config that a mask can express


@dataclass(frozen=True)
class SharedPrefixBatch:
    """Rows of [prompt | response | response ...], padded on the right. A row may hold several examples, one after another.

    The last token of each response is dropped from the inputs, because nothing is predicted from it. The first token of every response is
    predicted from the prompt's last position, so `states` contains that position once per response.
    """

    input_ids: torch.Tensor  # (B, T)
    position_ids: torch.Tensor  # (B, T): they start anew with every prompt; in every response they continue from the prompt's end
    prompts: torch.Tensor  # (B, T): index of the example; -1 padding
    segments: torch.Tensor  # (B, T): 0 prompt, 1 ... R responses, -1 padding
    states: torch.Tensor  # (N,): indices b * T + t of the positions that predict a response token, by example, then by response
    labels: torch.Tensor  # (N,): the tokens predicted at `states`
    responses: torch.Tensor  # (N,): index e * R + r of the response that the token belongs to
    num_tokens: torch.Tensor  # (E, R): tokens in the loss of each response
    counts: tuple[int, ...]  # tokens in the loss of each example, on the host: reading them does not wait for the device
    reference_states: Optional[torch.Tensor] = None  # (N, H): the reference's hidden states at `states`, if cached
    annotations: Optional[torch.Tensor] = None  # (E, R), float64: rating or label of each response
    baseline: Optional[torch.Tensor] = None  # z0 of kto, a scalar, nats

    def to(self, device: torch.device) -> "SharedPrefixBatch":
        """Return a copy on `device`; from pinned memory the copy is asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "SharedPrefixBatch":
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function) -> "SharedPrefixBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, torch.Tensor)})

    def with_reference(self, states: torch.Tensor) -> "SharedPrefixBatch":
        """Return a copy with the reference's hidden states.

        Args:
            states: (N, H), at the positions of `self.states`.
        """
        return replace(self, reference_states=states)

    def visible(self, window: Optional[int] = None) -> torch.Tensor:
        """Return what each position attends to: itself, and what precedes it in the prompt and in its own response.

        Args:
            window: tokens of a sliding window: a position attends no further back than window - 1 position ids. None: full attention.

        Returns:
            (B, T, T), bool: entry [b, i, j] is true if position i attends to position j.
        """
        steps = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        seen, own = self.segments[:, None, :], self.segments[:, :, None]
        visible = (steps[:, None] >= steps) & (self.prompts[:, None, :] == self.prompts[:, :, None]) & ((seen == 0) | (seen == own))
        if window is not None:
            visible &= self.position_ids[:, :, None] - self.position_ids[:, None, :] < window
        return visible


def row_multiple(device: torch.device) -> int:
    """Return the number that the length of rows is rounded up to a multiple of, in tokens.

    On a GPU attention would otherwise pad the mask in every layer, and torch.compile would make graphs for aligned and other lengths.
    """
    return 1 if device.type == "cpu" else 8


def shared_prefix_batch(examples: Sequence[tuple], multiple: int = 1, per_row: Optional[Sequence[int]] = None) -> SharedPrefixBatch:
    """Build a batch.

    Args:
        examples: tuples (prompt, responses[, masks[, annotations]]), as data.split.TokenizedExample. Prompt and responses are lists of
            token ids, none empty; every example has the same number R of responses. masks: the loss mask of each response (1 = in the
            loss); None: all tokens are. annotations: R numbers, the rating or label of each response; ignored if an example has none.
        multiple: the length T of the rows is rounded up to a multiple of this, see `row_multiple`.
        per_row: number of consecutive examples in each row; None: one.

    Returns:
        a SharedPrefixBatch on the CPU.

    Example: shared_prefix_batch([([5, 6], [[7, 8], [9]])]) has input_ids [[5, 6, 7]], states [1, 2, 1] and labels [7, 8, 9].
    """
    per_row = [1] * len(examples) if per_row is None else per_row
    lengths = [len(prompt) + sum(len(response) - 1 for response in responses) for prompt, responses, *_ in examples]
    starts = np.cumsum([0, *per_row])
    longest = max(sum(lengths[a:b]) for a, b in zip(starts, starts[1:]))
    shape = len(per_row), -(-longest // multiple) * multiple
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    prompts, segments = np.full(shape, -1), np.full(shape, -1)
    states, labels, owners, num_tokens = [], [], [], np.zeros((len(examples), len(examples[0][1])), np.int64)
    for e, (prompt, responses, *more) in enumerate(examples):
        b = int(np.searchsorted(starts, e, "right")) - 1
        begin = sum(lengths[starts[b] : e])
        n, end = len(prompt), begin + len(prompt)
        prompts[b, begin : begin + lengths[e]] = e
        input_ids[b, begin:end], position_ids[b, begin:end], segments[b, begin:end] = prompt, np.arange(n), 0
        for r, response in enumerate(responses):
            start, end = end, end + len(response) - 1
            input_ids[b, start:end], position_ids[b, start:end], segments[b, start:end] = (
                response[:-1],
                np.arange(n, n + end - start),
                r + 1,
            )
            keep = np.array(more[0][r], bool) if more and more[0] is not None else slice(None)
            labels.append(np.array(response)[keep])
            states.append(b * shape[1] + np.concatenate([[begin + n - 1], np.arange(start, end)])[keep])
            num_tokens[e, r] = len(labels[-1])
            owners.append(np.full(num_tokens[e, r], e * len(responses) + r))
    annotations = [example[3] if len(example) > 3 else () for example in examples]
    flat = (np.concatenate(parts).astype(np.int64) for parts in (states, labels, owners))
    return SharedPrefixBatch(
        *map(torch.from_numpy, (input_ids, position_ids, prompts, segments, *flat)),
        torch.from_numpy(num_tokens),
        tuple(num_tokens.sum(-1).tolist()),
        annotations=torch.tensor(annotations, dtype=torch.float64) if all(annotations) else None,
    )


def sliding_window(config) -> Optional[int]:
    """Return the sliding window of a Transformers config in tokens; None if all layers use full attention."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return None if kinds and "sliding_attention" not in kinds else getattr(config, "sliding_window", None)


def attention_masks(rows: SharedPrefixBatch, config) -> Union[torch.Tensor, Mapping[str, torch.Tensor]]:
    """Build the `attention_mask` of a Transformers model, with which it attends as `SharedPrefixBatch.visible` defines.

    Args:
        rows: the batch.
        config: the model's config, for which `unsupported_attention` returns None.

    Returns:
        a mask (B, 1, T, T) in the form that the model's attention implementation takes: bool, additive float, or a BlockMask. If the
        config lists layer types, a mask for each type, by its name.
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
    """Return 0 where visible, else the lowest float32, for attention that adds the mask to its scores."""
    visible = rows.visible(window).unsqueeze(1)
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, torch.finfo(torch.float32).min)


def block_mask(rows: SharedPrefixBatch, window: Optional[int]):
    """Return a BlockMask for FlexAttention, which skips blocks in which nothing is visible."""
    from torch.nn.attention.flex_attention import create_block_mask  # imported here, because that takes a second

    prompts, segments, positions = rows.prompts, rows.segments, rows.position_ids
    batch, length = segments.shape

    def visible(b, _, query, key):
        same = (prompts[b, key] == prompts[b, query]) & ((segments[b, key] == 0) | (segments[b, key] == segments[b, query]))
        near = positions[b, query] - positions[b, key] < (window or length)
        return (query >= key) & same & near

    return create_block_mask(visible, batch, None, length, length, device=segments.device)


# By attention implementation of Transformers. FlashAttention is missing: it takes no such mask.
FORMS = {"sdpa": _boolean, "eager": _additive, "flex_attention": block_mask}


def unsupported_attention(config) -> Optional[str]:
    """Return why a model of this Transformers config cannot compute a SharedPrefixBatch, as a clause; None if no reason is known."""
    unknown = set(getattr(config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        return f"it has layers of {', '.join(sorted(unknown))}"
    if config._attn_implementation not in FORMS:
        return f"its attention, {config._attn_implementation}, takes no mask that keeps responses apart"
    return None
