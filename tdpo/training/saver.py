"""When a run's checkpoints are published and removed: only sound weights, and never the last ones that are known to be sound."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from omegaconf import DictConfig
from torch import nn

from tdpo.checkpointing.checkpoints import BEST, complete_checkpoint, list_checkpoints, point, remove_old, save_checkpoint
from tdpo.distributed.sharding import whole_state
from tdpo.distributed.world import World
from tdpo.training.adapter_files import AdapterFiles
from tdpo.utils import RunError, get_logger, not_finite, some_of

log = get_logger(__name__)

Export = Callable[[str, Mapping[str, torch.Tensor]], None]  # writes a Hugging Face folder: (its path, whole state dict)


def policy_saved(config: DictConfig) -> str:
    """Return which checkpoints of a run get policy.pt: `save_policy`, or its default, which depends on whether there are adapters."""
    return config.save_policy or ("always" if config.adapter.rank is None else "final")


class Saver:
    """The checkpoints of a run.

    Args:
        world: the run's ranks.
        run_dir: an existing folder.
        config: a checked config: save_policy, adapter and keep_checkpoints are read.
        adapters: writes the policy's adapters; None: it has none.
    """

    def __init__(self, world: World, run_dir: str, config: DictConfig, adapters: Optional[AdapterFiles] = None):
        self.world, self.run_dir, self.keep = world, run_dir, config.keep_checkpoints
        self.adapters = adapters
        self.save_policy = policy_saved(config)
        self.saved_at = -1  # train examples of the newest checkpoint
        self.newest: Optional[str] = None  # its folder
        self.proven: Optional[str] = None  # the newest checkpoint that a finite step or, at the end, a finite eval has followed
        self.resumed_from: Optional[str] = None
        self.best_at = -1  # train examples of the best checkpoint, to which BEST points; -1: there is none

    def resume(self, folder: str, examples: int) -> None:
        """Start with the checkpoint that the run is resumed from; `examples` are its train examples."""
        self.saved_at, self.newest, self.resumed_from = examples, folder, folder

    def save(
        self, policy: nn.Module, tensors: Callable[[], Mapping[str, Any]], progress: Mapping[str, Any], export: Export, final: bool
    ) -> None:
        """Write a checkpoint if this step has none yet. `final` adds a Hugging Face folder. Called on all ranks.

        Args:
            policy: whole or sharded.
            tensors: returns what resuming needs, see save_checkpoint.
            progress: Progress as a JSON-serializable dict.
            export: writes the Hugging Face folder.
            final: whether the run ends with this checkpoint.

        Raises:
            RunError: weights or optimizer state are not finite, or the checkpoint could not be written; earlier ones are untouched.
        """
        with_policy = self.save_policy == "always" or (final and self.save_policy == "final")
        is_new = self.saved_at != progress["examples"]
        archive = progress["reference"]["archive"]
        if self.adapters is not None and is_new:
            self.adapters.save_base(archive, export)
        state = None
        if (is_new and with_policy) or final:
            state = whole_state(self.world, policy) if self.adapters is None else self.adapters.merged()
        written = state if with_policy else None
        if is_new:
            self._check(content := tensors())
            exported = (lambda folder: export(folder, state)) if final else None
            adapter = None if self.adapters is None else self.adapters.writer(archive)
            self.newest = save_checkpoint(self.world, self.run_dir, written, content, progress, exported, adapter)
            self.saved_at = progress["examples"]
            log.info(f"checkpoint: {self.newest}")
        elif final:
            complete_checkpoint(self.world, self.newest, written, progress, lambda folder: export(folder, state))
        if self.best_at >= 0:
            self.point_best(self.best_at)
        self._remove_old()

    def _check(self, tensors: Mapping[str, Any]) -> None:
        """Raise RunError on all ranks if weights or optimizer state are not finite: a step with finite loss and gradient can ruin them."""
        states = {f"{name}.{key}": x for name, some in tensors["optimizer"].items() for key, x in some.items()}
        named = self.world.gather(not_finite({**states, **tensors.get("reference", {}), **tensors["policy"]}))
        bad = {name for names in named for name in names}
        with self.world.agreed():
            if bad and self.world.is_first:
                kept = f"the last checkpoint is {self.newest}" if self.newest else "there is no checkpoint"
                raise RunError(
                    f"weights or optimizer state are not finite after the last step ({some_of(sorted(bad), 3)}): not saved; {kept}\n"
                    "try a smaller lr or max_grad_norm"
                )

    def point_best(self, examples: int) -> bool:
        """Point BEST to the checkpoint after `examples` train examples; below 0, remove the link. Called on all ranks.

        Returns:
            whether that checkpoint is there (True if none is meant).
        """
        name = f"step-{examples}"
        there = examples < 0 or self.world.from_first(lambda: os.path.isdir(os.path.join(self.run_dir, name)))
        link = os.path.join(self.run_dir, BEST)
        with self.world.agreed():
            if self.world.is_first and os.path.islink(link) and (examples < 0 or not there):
                os.remove(link)
            elif self.world.is_first and examples >= 0 and there and not (os.path.islink(link) and os.readlink(link) == name):
                point(self.run_dir, BEST, name)
        return there

    def step_followed(self) -> None:
        """Note that a step with finite loss and gradient was taken from the newest checkpoint, or from weights after it."""
        if self.proven != self.newest:
            self.proven = self.newest
            self._remove_old()

    eval_followed = step_followed  # after the last step of a run no other can follow

    def _remove_old(self) -> None:
        # After resuming none is proven yet, and the one from which the run was resumed may be useless.
        if self.keep is not None and self.proven is not None and self.world.is_first:
            remove_old(self.run_dir, self.keep, never=[folder for folder in (self.resumed_from, self.proven) if folder])

    def doubt(self) -> str:
        """Return a line of advice if the newest checkpoint may hold the cause of a step that was not finite; else ''."""
        if self.newest is None or self.newest == self.proven or not self.world.is_first:
            return ""
        before = next((folder for folder in list_checkpoints(self.run_dir) if folder != self.newest), None)
        remedy = f"remove it to resume from {before}" if before else "start again in another folder"
        return f"\nno finite step has followed {self.newest}: if its weights are the cause, {remedy}"
