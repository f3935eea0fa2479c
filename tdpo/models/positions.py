"""Rotary positions whose scaling does not depend on the batch."""

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import nn

LENGTH_DEPENDENT = ("dynamic", "longrope")  # kinds of scaling whose frequencies follow the longest text of a forward pass


def most_positions(config) -> Optional[int]:
    """Return the most tokens that a model of this Transformers config computes with; None if its config sets no limit.

    Dynamic scaling goes on beyond max_position_embeddings, by its factor.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < 1:  # as XLNet says that it has no limit
        return None
    factors = [rope.get("factor", 1.0) for rope in _ropes(config) if "dynamic" in rope.get("rope_type", "")]
    return positions if positions is None else int(positions * min(factors, default=1.0))


def scaling_by_length(config, max_length: int) -> Optional[str]:
    """Return the kind of scaling by which texts of max_length tokens get other frequencies than short ones; None if there is none."""
    config = config.get_text_config()
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if "dynamic" in kind and max_length > config.max_position_embeddings:
            return kind
        if kind == "longrope" and max_length > rope.get("original_max_position_embeddings", max_length):
            return kind
    return None


def hold_scaling(model: nn.Module, max_length: int) -> None:
    """Let a model scale its rotary positions in every forward pass as for max_length tokens, in place.

    With dynamic or longrope scaling the frequencies follow the longest text of a forward pass, so that loss and gradient would depend on
    how the batch is cut, and on the other texts in it. vLLM too chooses longrope's factors by the most tokens that it is to serve.

    Args:
        model: of Transformers; may be on the meta device.
        max_length: tokens of prompt and response.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if any(word in str(kind) for kind in (kinds.values() if isinstance(kinds, Mapping) else [kinds]) for word in LENGTH_DEPENDENT):
            module.register_forward_pre_hook(_Longest(max_length), with_kwargs=True)
            module.register_forward_hook(_without_last)


class _Longest:
    """Adds position max_length - 1 to those that a rotary embedding is called with, forward(x, position_ids, ...)."""

    def __init__(self, max_length: int):
        self.max_length = max_length

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": self._longer(kwargs["position_ids"])}
        return (args[0], self._longer(args[1]), *args[2:]), kwargs

    def _longer(self, positions: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(positions, (0, 1), value=self.max_length - 1)


def _without_last(module: nn.Module, args: tuple, output: Any) -> Any:
    """Drop the added position from cosines and sines, (..., T + 1, D)."""
    return tuple(part[..., :-1, :] for part in output) if isinstance(output, tuple) else output[..., :-1, :]


def _ropes(config) -> list[Mapping[str, Any]]:
    """Return the rope parameters of a text config: one set, or one for each kind of layer."""
    ropes = getattr(config, "rope_parameters", None) or {}
    inner = [rope for rope in ropes.values() if isinstance(rope, Mapping)]
    return inner or [ropes]
