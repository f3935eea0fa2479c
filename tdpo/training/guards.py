"""What may end a run for its numbers or its memory, and what its first step should show."""

from collections.abc import Mapping, Sequence
from typing import Optional

import torch
from omegaconf import DictConfig

from tdpo.checkpointing.training_state import Progress
from tdpo.data.split import Example, TokenizedSplit
from tdpo.distributed.world import World
from tdpo.training.metrics import start_difference
from tdpo.training.strategies import SingleDevice
from tdpo.utils import RunError, get_logger, some_of

log = get_logger(__name__)

STEP_ZERO_TOLERANCE = 1e-3  # nats: far above rounding, far below what one step of training does


class Guards:
    """The checks of a run.

    Args:
        config: a checked config.
        data: by split (train, eval).
        strategy: the trainer's.
    """

    def __init__(self, config: DictConfig, data: Mapping[str, TokenizedSplit], strategy: SingleDevice, world: World):
        self.config, self.data, self.strategy, self.world = config, data, strategy, world

    def may_take_step(
        self,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        examples: Sequence[Example],
        losses: Sequence[torch.Tensor],
        progress: Progress,
    ) -> bool:
        """Whether to take the step: the same answer on all ranks. The one place in a step that waits for the device.

        Args:
            loss: this rank's sum.
            grad_norm: of all ranks' gradient.
            examples, losses: this rank's.

        Raises:
            RunError: loss or gradient are not finite, and max_skipped_steps such steps were skipped already.
        """
        bad = torch.stack([~loss.isfinite(), ~grad_norm.isfinite().to(loss.device)]).int()
        bad_losses, bad_norm = self.world.sum(bad).tolist()
        if not bad_losses and not bad_norm:
            return True
        skipped = progress.skipped_steps + 1
        term = "loss" if bad_losses else "gradient norm"
        finite = torch.cat(list(losses)).isfinite().tolist() if bad_losses else [False] * len(examples)
        ids = [self.data["train"].element(example)["example_id"] for example, ok in zip(examples, finite) if not ok]
        by_rank = self.world.gather(ids)[: self.strategy.data_rank[1]]
        where = [some_of(ids, 8) if self.world.size == 1 else f"{some_of(ids, 8)} (rank {rank})" for rank, ids in enumerate(by_rank) if ids]
        message = f"step {progress.updates + skipped}: the {term} is not finite; examples {'; '.join(where)}"
        with self.world.agreed():
            if skipped > self.config.max_skipped_steps and self.world.is_first:
                raise RunError(
                    f"{message}\nstopped before the step was taken; a smaller lr or max_grad_norm, or model.policy_dtype=float32 may help "
                    "(max_skipped_steps leaves such steps out)"
                )
        log.info(f"{message}: left out ({skipped} of {self.config.max_skipped_steps})")
        return False

    def warn_of_start(self, metrics: Mapping[str, float], reward_scale: Optional[float]) -> None:
        """Warn if policy and reference, the same model at the first step, have other scores there.

        Args:
            metrics: of the first train step.
            reward_scale: see Objective.
        """
        worst = start_difference(metrics, "train", reward_scale)
        if worst is not None and worst > STEP_ZERO_TOLERANCE:
            log.warning(f"policy and reference differ before the first step, by {worst:.2g} nats: other dtypes or weights?")

    def out_of_memory(self, what: str, remedy: str) -> RunError:
        """Return an error that says what does not fit, and what to change: `remedy`, or what helps in any case."""
        more = ", parallel.reduce_once_a_step=false" if self.strategy.sharded else ""
        return RunError(
            f"out of memory on {self.world.device} with {what}\n"
            f"try {remedy}, a smaller max_length, model.fsdp_policy_mp=bfloat16{more} or activation_checkpointing=true"
        )

    def out_of_memory_in_pass(self, current: Optional[tuple[list[Example], str]], progress: Progress) -> RunError:
        """The same of the examples and split that were being scored."""
        examples, split = current or ([], "train")
        longest = max(self.data[split].lengths(examples), default=0)
        what = f"{len(examples)} {split} examples, the longest of {longest} tokens, in step {progress.updates + 1}"
        return self.out_of_memory(what, "a smaller tokens_per_microbatch" if split == "train" else "a smaller eval_batch_size")
