"""model.archive as a file: a policy.pt of ours or of the published code, read without running what it holds."""

import os
import zipfile
from collections.abc import Mapping

import torch

from tdpo.utils import UserError, some_of

# Buffers that checkpoints of 2023 carry and models no longer have.
LEGACY_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def read_archive(path: str) -> dict[str, torch.Tensor]:
    """The state dict of a policy.pt, also of one that the published code wrote; tensors stay on disk until they are copied.

    Raises:
        UserError: no such file, or it is no policy.pt.
    """
    if not os.path.isfile(path):
        raise UserError(f"model.archive={path} does not exist")
    if not zipfile.is_zipfile(path):
        raise UserError(f"model.archive={path} is no policy.pt: torch.save did not write it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in content["state"].items()}
    except Exception as error:  # zip, pickle and key errors: whatever it is, it is no policy.pt
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"model.archive={path} is no policy.pt, a file with {{step_idx, state, metrics}} ({reason})") from None
    return {name: tensor for name, tensor in state.items() if not name.endswith(LEGACY_BUFFERS)}


def check_archive(path: str, state: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Compare an archive with a model, which may be on the meta device.

    Raises:
        UserError: keys are missing or too many, or shapes differ; it names them.
    """
    expected = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(expected) - set(state) - tied)
    unexpected = sorted(set(state) - set(expected))
    shapes = [
        f"{name} {tuple(state[name].shape)} (model: {tuple(expected[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = [("missing", missing), ("not in the model", unexpected), ("other shape", shapes)]
    found = "; ".join(f"{what}: {some_of(names, 4)}" for what, names in problems if names)
    if found:
        raise UserError(f"model.archive={path} does not fit the model: {found}")
