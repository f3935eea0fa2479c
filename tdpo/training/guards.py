"""Checks of a run: how it can be scored, finite loss and gradient, policy and reference equal at the start; errors for lack of memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Optional

import torch
from omegaconf import DictConfig

from tdpo.checkpointing.training_state import Progress
from tdpo.data.split import Example, TokenizedSplit
from tdpo.distributed.world import World
from tdpo.microbatches import Packing
from tdpo.scoring.mixed_precision import slow_dtype
from tdpo.scoring.probes import (
    check_predictions,
    fast_scoring_problem,
    flex_attention_problem,
    flex_attention_suits,
    hidden_size,
    packing_of,
    packing_problem,
    set_attention,
)
from tdpo.scoring.scorer import Scorer
from tdpo.training.compiling import allow_graphs
from tdpo.training.metrics import start_difference
from tdpo.training.saver import Saver
from tdpo.training.strategies import SingleDevice, without_randomness
from tdpo.utils import RunError, UserError, get_logger, some_of

log = get_logger(__name__)

STEP_ZERO_TOLERANCE = 1e-3  # nats; far above rounding errors, far below the effect of one train step


class PublishedMethods:
    """A base class of trainers. It refuses subclasses that override methods of the published trainers which nothing calls any more."""

    ABSENT = (
        "get_batch_metrics",
        "get_batch_samples",
        "concatenated_forward",
        "tdpo_concatenated_forward",
        "write_state_dict",
        "clip_gradient",
    )

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if found := [name for name in PublishedMethods.ABSENT if name in vars(cls)]:
            raise TypeError(f"{cls.__name__} overrides {some_of(found)}, which this training loop never calls: see docs/forks.md")


class Guards:
    """The checks of a run.

    Args:
        config: a checked config.
        data: by split (train, eval).
        strategy: the trainer's.
        world: the run's ranks.
    """

    def __init__(self, config: DictConfig, data: Mapping[str, TokenizedSplit], strategy: SingleDevice, world: World):
        self.config, self.data, self.strategy, self.world = config, data, strategy, world

    def choose_scoring(self, scorer: Scorer) -> tuple[bool, Optional[Packing]]:
        """Test the policy's predictions, and return whether to use fast scoring, and how its rows are filled, the same on all ranks.

        `auto` and `fast` test fast scoring too. A dtype that is slow on this device is told.

        Raises:
            UserError, RunError: the model's predictions depend on later tokens; scoring=fast, but the model does not support it; the test
                runs out of memory.
        """
        plain = self.config.scoring == "plain"
        if warning := slow_dtype(self.world.device, self.strategy.compute_dtype or scorer.policy.dtype):
            log.warning(warning)
        without_randomness(scorer.policy)
        try:
            with torch.no_grad(), self.strategy.forward_context():
                check_predictions(scorer, self.config.max_length)
                problem = None if plain else fast_scoring_problem(scorer, self.config.max_length)
        except torch.OutOfMemoryError as error:
            what = f"two sequences of max_length={self.config.max_length} tokens (the trial of fast scoring)"
            raise self.out_of_memory(what, "more devices") from error
        if plain:
            return False, None
        problems = [x for x in self.world.gather(problem) if x]
        name = type(scorer.policy).__name__
        if problems and self.config.scoring == "fast":
            raise UserError(f"scoring=fast: {name} does not support it: {problems[0]}; use scoring=plain")
        slow = f"plain, several times slower, because of {name}: {problems[0]}" if problems else ""
        log.info(f"scoring: {slow or 'fast'}")
        if problems:
            return False, None
        try:
            self.choose_attention(scorer)
            return True, self.choose_packing(scorer)
        except torch.OutOfMemoryError as error:
            what = "the trials of attention and of several prompts in a row"
            raise self.out_of_memory(what, "model.attn_implementation=sdpa, more devices") from error

    def choose_packing(self, scorer: Scorer) -> Optional[Packing]:
        """Return how to fill rows with several examples; None if the model cannot have several in a row."""
        try:
            with torch.no_grad(), self.strategy.forward_context():
                problem = packing_problem(scorer, self.config.max_length)
        except torch.OutOfMemoryError:
            problem = "there is too little memory"
        if problem := next(filter(None, self.world.gather(problem)), None):
            log.info(f"rows: one prompt each, because with several {problem}")
            return None
        return packing_of(hidden_size(scorer), self.config.max_length)

    def choose_attention(self, scorer: Scorer) -> None:
        """Give policy and reference FlexAttention on a GPU, where it can be faster and passes a test, unless the config names another."""
        config = self.config
        if config.model.attn_implementation == "flex_attention":
            allow_graphs()
        named = config.model.attn_implementation is not None or config.deterministic
        if named or self.world.device.type != "cuda" or not flex_attention_suits(scorer.policy.config, config.max_length):
            return
        allow_graphs()
        before = scorer.policy.config._attn_implementation
        try:
            problem = flex_attention_problem(scorer, config.max_length, self.strategy.compute_dtype or scorer.policy.dtype)
        except torch.OutOfMemoryError:
            problem = "there is too little memory"
        problem = next(filter(None, self.world.gather(problem)), None)
        if problem is None:
            set_attention(scorer, "flex_attention")
            with torch.no_grad(), self.strategy.forward_context():
                problem = fast_scoring_problem(scorer, config.max_length)
            problem = next(filter(None, self.world.gather(problem)), None)
        if problem is not None:
            set_attention(scorer, before)
        log.info(f"attention: {before}, because with flex_attention: {problem}" if problem else "attention: flex_attention")

    def may_take_step(
        self,
        loss: torch.Tensor,
        grad_norm: torch.Tensor,
        examples: Sequence[Example],
        losses: Sequence[torch.Tensor],
        progress: Progress,
        advice: Callable[[], str] = str,
    ) -> bool:
        """Whether to take the step: the same answer on all ranks. This is the only place in a step that waits for the device.

        Args:
            loss: sum of the losses of this rank's examples, a scalar, nats.
            grad_norm: norm of the whole gradient, a scalar.
            examples: this rank's examples of the step.
            losses: their losses, in nats: one tensor (B,) for each microbatch.
            progress: the counters before the step.
            advice: returns what to add to the error; called on rank 0.

        Raises:
            RunError: loss or gradient norm is not finite, and max_skipped_steps such steps were skipped already.
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
                    f"{message}\nthe run stopped before this step; try a smaller lr or max_grad_norm, or model.policy_dtype=float32 "
                    f"(max_skipped_steps=N skips up to N such steps){advice()}"
                )
        log.info(f"{message}: skipped ({skipped} of at most {self.config.max_skipped_steps})")
        return False

    def warn_of_eval(self, metrics: Mapping[str, float]) -> None:
        """Warn if a metric of an eval is not finite.

        Args:
            metrics: means over the eval examples.
        """
        if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
            log.warning(f"the eval is not finite: {some_of(bad, 4)}")

    def check_last_eval(self, progress: Progress, saver: Saver) -> None:
        """Accept the run's last checkpoint as sound if its eval is finite.

        Raises:
            RunError: it is not. The checkpoint, whose weights are finite, is kept.
        """
        bad = [name for name, value in progress.eval_metrics.items() if not math.isfinite(value)]
        if not bad:
            saver.eval_followed()
            return
        with self.world.agreed():
            if self.world.is_first:
                kept = f"; before it, finite steps followed {saver.proven}" if saver.proven else ""
                raise RunError(f"the last eval is not finite ({some_of(bad, 4)}): do not use {saver.newest or 'the result'}{kept}")

    def warn_of_start(self, metrics: Mapping[str, float], reward_scale: Optional[float]) -> None:
        """Warn if policy and reference, which are the same model before the first step, get different scores.

        Args:
            metrics: means of the first train step.
            reward_scale: see Objective.
        """
        worst = start_difference(metrics, "train", reward_scale)
        if worst is not None and worst > STEP_ZERO_TOLERANCE:
            why = "compile=true rounds their graphs differently" if self.config.compile else "check their dtypes and weights"
            log.warning(f"policy and reference differ before the first step, by {worst:.2g} nats: {why}")

    def out_of_memory(self, what: str, remedy: str) -> RunError:
        """Return an error that says what did not fit, and what to change.

        Args:
            what: what was computed.
            remedy: what to try first; what helps in any case is added.
        """
        more = ", parallel.reduce_once_a_step=false" if self.strategy.sharded else ""
        return RunError(
            f"out of memory on {self.world.device} with {what}\n"
            f"try {remedy}, a smaller max_length, model.fsdp_policy_mp=bfloat16{more} or activation_checkpointing=true"
        )

    def out_of_memory_in_pass(self, current: Optional[tuple[list[Example], str]], progress: Progress) -> RunError:
        """Return an error that names the examples that were being scored.

        Args:
            current: these examples and their split, see Passes; None before the first pass.
            progress: the counters before the step.
        """
        examples, split = current or ([], "train")
        longest = max(self.data[split].lengths(examples), default=0)
        what = f"{len(examples)} {split} examples, the longest of {longest} tokens, in step {progress.updates + 1}"
        return self.out_of_memory(what, "a smaller tokens_per_microbatch" if split == "train" else "a smaller eval_batch_size")
