"""What a run with adapters saves besides the state that resuming needs: adapter/ in every checkpoint, and base/, the model below them."""

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Optional

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from torch import nn

from tdpo.distributed.sharding import whole_state
from tdpo.distributed.world import World
from tdpo.files import usual_modes
from tdpo.models.adapters import merged, named_base, save_adapter
from tdpo.utils import RunError, get_logger, reason_of
from tdpo.weights import is_adapter_name, without_adapters

log = get_logger(__name__)


class AdapterFiles:
    """Writes a policy's adapters, merged weights and base. Its methods are called on all ranks.

    Args:
        world: the run's ranks.
        policy: has adapters; whole or sharded.
        model: the config's `model`.
        run_dir: the run's folder.
    """

    def __init__(self, world: World, policy: nn.Module, model: DictConfig, run_dir: str):
        self.world, self.policy, self.model = world, policy, model
        self.folder = os.path.join(os.path.abspath(run_dir), "base")

    def merged(self) -> dict[str, torch.Tensor]:
        """Return the whole state dict with the adapters merged into it on rank 0, {} on the others."""
        return merged(self.policy, whole_state(self.world, self.policy))

    def writer(self, archive: Optional[str]) -> Callable[[str], None]:
        """Return a function that writes adapter/ into the folder that it is given; to be called on rank 0.

        Args:
            archive: the weights that the run started from.
        """
        base = named_base(self.model, archive) or self.folder
        matrices = whole_state(self.world, self.policy, is_adapter_name)

        def write(folder: str) -> None:
            try:
                save_adapter(self.policy, matrices, base, folder)
            except SafetensorError as error:  # what safetensors makes of a full disk
                raise OSError(str(error)) from error

        return write

    def save_base(self, archive: Optional[str], export: Callable[[str, Mapping[str, torch.Tensor]], None]) -> None:
        """Export the model below the adapters to base/, once, unless a name on the hub or a folder has it: else peft would not find it.

        Args:
            archive: as for `writer`.
            export: writes a Hugging Face folder: (its path, whole state dict).
        """
        if named_base(self.model, archive) or self.world.from_first(lambda: os.path.exists(self.folder)):
            return
        state = whole_state(self.world, self.policy, lambda name: not is_adapter_name(name))
        with self.world.agreed():
            if not self.world.is_first:
                return
            try:
                kind = "dequantised model" if self.model.quantize else "model"
                log.info(f"base: the {kind} below the adapters is written to {self.folder}, where peft looks for it")
                temporary = self.folder + ".tmp"
                shutil.rmtree(temporary, ignore_errors=True)
                export(temporary, without_adapters(state))
                usual_modes(temporary)
                os.rename(temporary, self.folder)
            except (OSError, RuntimeError, SafetensorError) as error:  # mostly a full disk
                shutil.rmtree(temporary, ignore_errors=True)
                raise RunError(f"{self.folder}, the base of the adapters, could not be written ({reason_of(error)})") from error
