"""Reader of `model.archive` files: a policy.pt of this project or of the published code. Code in the file is never executed."""

import os
import zipfile
from collections.abc import Mapping

import torch

from tdpo.utils import UserError, some_of

# Buffers in checkpoints of 2023 that today's models no longer have.
LEGACY_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def read_archive(path: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a policy.pt, without legacy buffers. Tensors stay on disk (memory-mapped) until they are copied.

    Raises:
        UserError: the file does not exist, or is not a policy.pt.
    """
    if not os.path.isfile(path):
        raise UserError(f"model.archive={path} does not exist")
    if not zipfile.is_zipfile(path):
        raise UserError(f"model.archive={path} is not a policy.pt (torch.save did not write it): give one, or a Hugging Face folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in content["state"].items()}
    except Exception as error:  # zip, pickle or key errors: the file is not a policy.pt
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"model.archive={path} is not a policy.pt, a file with {{step_idx, state, metrics}} ({reason})") from None
    return {name: tensor for name, tensor in state.items() if not name.endswith(LEGACY_BUFFERS)}


def check_archive(path: str, state: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Check that an archive has a model's keys and shapes.

    Args:
        path: the archive's path, for the message.
        state: name -> tensor of any shape, see `read_archive`.
        model: may be on the meta device.

    Raises:
        UserError: keys are missing or unexpected, or shapes differ. The message names them.
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
