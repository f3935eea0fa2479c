"""The training loop.

`train` only schedules: `train_step` is one optimizer step, `evaluate`, `sample`, `log_train` and `save` do what their names say. What
differs between one device and several is in a few methods at the end, which FSDPTrainer overrides: no loop is written twice.
"""

import inspect
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Optional

import numpy as np
import torch
import tqdm
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.tensor import DTensor

from tdpo.checkpointing.checkpoints import add_export, remove_old, save_checkpoint
from tdpo.checkpointing.resume import Resumed, archive_of
from tdpo.checkpointing.training_state import restore_tensors, training_tensors
from tdpo.data.batching import EVAL_SEED, BatchStream, Example, TokenizedSplit, ahead, get_collate_fn
from tdpo.distributed.signals import StopSignals
from tdpo.distributed.tensor_parallel import split_matrices, tensor_parallel_plan
from tdpo.distributed.world import World, find_blocks, fingerprint, load_weights, shard_scorer, whole_state
from tdpo.losses import objective_of, preference_loss, tdpo_loss
from tdpo.models.sampling import generate, interleaved, mixed_seed, own_distribution
from tdpo.scoring.chunked_loss import HeadOnly
from tdpo.scoring.scorer import (
    Scored,
    Scorer,
    _get_batch_logps,
    _tdpo_get_batch_logps,
    cast_parameters,
    concatenated_inputs,
    fast_scoring_problem,
)
from tdpo.training.feeder import Feeder, Microbatch
from tdpo.training.metrics import MetricSums, Sink, example_metrics
from tdpo.training.reference_cache import ReferenceCache, identity_of
from tdpo.utils import DTYPES, RunError, Stopped, UserError, full_tensor, get_local_dir, plural, some_of

# preference_loss and the next ones are here for forks of the published code that import them from trainers.
__all__ = [
    "BasicTrainer",
    "FSDPTrainer",
    "TensorParallelTrainer",
    "preference_loss",
    "tdpo_loss",
    "_get_batch_logps",
    "_tdpo_get_batch_logps",
    "concatenated_inputs",
]

STEP_ZERO_TOLERANCE = 1e-3  # nats: far above rounding, far below what one step of training does


class BasicTrainer:
    """Trains on one device: a GPU if there is one, else the CPU.

    Args:
        policy: the model to train, on the CPU; for several devices without weights, on the meta device.
        config: a checked config.
        seed: of the order of the train data and of sampling.
        run_dir: an existing folder for checkpoints.
        reference_model: frozen; None where the loss needs none.
        train_data, eval_data: tokenized splits.
        tokenizer: to pad, and to decode samples.
        sinks: where metrics and samples go; none but on rank 0.
        world: the processes that train together.
        weights: for models on the meta device, functions that build them with their weights, called on rank 0: {"policy", "reference"}.
    """

    sharded = False  # whether it wants models on the meta device, and `weights`

    def __init__(
        self,
        policy: nn.Module,
        config: DictConfig,
        seed: int,
        run_dir: str,
        reference_model: Optional[nn.Module] = None,
        *,
        train_data: TokenizedSplit,
        eval_data: TokenizedSplit,
        tokenizer,
        sinks: list[Sink],
        world: Optional[World] = None,
        weights: Optional[Mapping[str, Callable[[], nn.Module]]] = None,
    ):
        self.world = world or World()
        self.config, self.seed, self.run_dir = config, seed, run_dir
        self.data = {"train": train_data, "eval": eval_data}
        self.tokenizer, self.sinks = tokenizer, sinks
        self.device = self.world.device
        self.objective = objective_of(OmegaConf.to_container(config.loss), config.log_kl)
        mp = config.model.fsdp_policy_mp
        self.compute_dtype = DTYPES[mp] if mp not in (None, config.model.policy_dtype) else None
        if config.activation_checkpointing:
            # Its name before Transformers 5.23, and since.
            enable = getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.reference_identity = ""  # of its weights, on rank 0
        self.archive = config.model.archive and os.path.realpath(config.model.archive)
        if config.compile:
            for block in [
                block for model in (policy, reference_model) if model is not None for block in find_blocks(model, config.model.block_name)
            ]:
                block.compile(dynamic=True)
        self.scorer = self.place(Scorer(policy, reference_model, self.objective, config.compile), weights or {})
        self.policy, self.reference_model = self.scorer.policy, self.scorer.reference

        self.moves_reference = self.objective.in_parts or config.reference.update_every is not None
        self.order: Optional[list[int]] = None  # of the train examples by number, where loss.order is not the data's
        self.batches = self.batch_stream()
        eval_order = next(eval_data.epochs(EVAL_SEED))
        self.eval_examples = eval_order[: config.n_eval_examples]
        placeholders = {"train": next(iter(self.batches))[0], "eval": self.eval_examples[0]}
        cut = config.gradient_accumulation_steps, config.tokens_per_microbatch
        self.feeder = Feeder(self.data, get_collate_fn(tokenizer), self.device, self.data_rank, *cut, placeholders)
        self.feeder.fast, self.feeder.mismatched = self.choose_scoring(), self.objective.needs_baseline
        self.generation_config = own_distribution(tokenizer, config.max_length)
        with self.world.agreed():
            self.optimizer = self.make_optimizer()
        self.example_counter = self.batch_counter = self.skipped_steps = 0
        self.batches_given = 0  # position in the train data
        self.previous_counter = -1  # example_counter before the last step
        self.evaluated_at = self.saved_at = -1  # example_counter
        self.eval_metrics: dict[str, float] = {}
        self.last_log: Optional[float] = None
        self.checkpoint: Optional[str] = None  # the newest
        self.resumed_from: Optional[str] = None
        self.wandb_id: Optional[str] = None  # of the run that goes on
        self.signals = StopSignals()
        torch.manual_seed(self.seed)
        np.random.seed(self.seed)
        random.seed(self.seed)

    def choose_scoring(self) -> bool:
        """Whether scoring is fast: `scoring` decides, auto by trying it on the model. The same on all ranks.

        Raises:
            UserError: scoring=fast, and the model cannot be scored so.
        """
        if self.config.scoring == "plain":
            return False
        what = f"two sequences of max_length={self.config.max_length} tokens, by which fast scoring is tried"
        with self.explained_out_of_memory(lambda: what, "more devices"), torch.no_grad(), self.computing():
            problem = fast_scoring_problem(self.scorer, self.config.max_length)
        problems = [x for x in self.world.gather(problem) if x]
        if problems and self.config.scoring == "fast":
            raise UserError(f"scoring=fast: {type(self.policy).__name__} cannot be scored so: {problems[0]}; use scoring=plain")
        slow = f"plain, several times slower, because of {type(self.policy).__name__}: {problems[0]}" if problems else ""
        print(f"scoring: {slow or 'fast'}")
        return not problems

    def batch_stream(self) -> BatchStream:
        """The train data: in parts for sdpo_stepwise."""
        config, data, parts = self.config, self.data["train"], None
        if self.objective.in_parts:
            examples = next(data.epochs(self.seed, shuffle=False))
            ordered = examples if self.order is None else [examples[i] for i in self.order]
            n = self.objective.hyperparameters["parts"]
            parts = [ordered[len(ordered) * i // n : len(ordered) * (i + 1) // n] for i in range(n)]
        return BatchStream(data, config.batch_size, self.seed, config.n_epochs, config.n_examples, config.drop_last, parts=parts)

    # --- schedule ---

    def train(self) -> None:
        """Train on every batch, with evals, logs and checkpoints in between; one eval and one checkpoint at the end.

        Raises:
            Stopped: a signal asked for it; there is a checkpoint of the last whole step.
        """
        with self.signals, self.progress_bar() as progress:
            try:
                if self.config.reference_cache and self.reference_model is not None:
                    self.cache_reference()
                if self.objective.hyperparameters.get("order") == "easy_to_hard":
                    self.order = self.order or self.easy_to_hard()
                    self.batches = self.batch_stream()
                for examples, microbatches in ahead(self.feeder.train, self.batches.after(self.batches_given)):
                    self.between_steps()
                    metrics = self.train_step(examples, microbatches)
                    self.log_train(metrics, progress)
                    progress.update(len(examples))
                if self.evaluated_at != self.example_counter:
                    self.evaluate()
                self.save(final=True)
            except Stopped:
                self.save()
                raise

    def progress_bar(self) -> tqdm.tqdm:
        total = len(self.batches) * self.config.batch_size
        return tqdm.tqdm(total=total, initial=self.example_counter, desc="Training", unit=" examples", disable=self.hide_progress)

    @property
    def hide_progress(self) -> Optional[bool]:
        """tqdm's `disable`: without a terminal, and on all ranks but one."""
        return None if self.world.is_first else True

    def between_steps(self) -> None:
        """Stop, evaluate and save, where that is due; each once, also where a run goes on from here."""
        self.check_stop()
        config = self.config
        evaluated = self.evaluated_at == self.example_counter
        if self.is_due(config.eval_every) and not evaluated and (self.example_counter > 0 or config.do_first_eval):
            self.evaluate()
        if self.example_counter > 0 and self.is_due(config.save_every or config.eval_every):
            self.save()

    def check_stop(self) -> None:
        """Raises Stopped on all ranks together, where one of them was sent a signal."""
        (signum,) = self.world.maximum(self.signals.received)
        if signum:
            raise Stopped(signum)

    def is_due(self, every: int) -> bool:
        """Whether the last step has reached or passed a multiple of `every` train examples; true before the first step."""
        return self.example_counter // every > self.previous_counter // every

    # --- one step ---

    def train_step(self, examples: list[Example], microbatches: list[Microbatch]) -> MetricSums:
        """One optimizer step on one global batch: the gradient is the sum over its examples, divided by their number.

        Args:
            examples: the batch.
            microbatches: this rank's parts of it.
        """
        self.policy.train()
        started = time.perf_counter()
        sums = MetricSums()
        losses = []
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.computing():
            microbatches = self.with_baseline(microbatches)
            for i, microbatch in enumerate(microbatches):
                self.before_backward(is_last=i == len(microbatches) - 1)
                what = partial(self.described, microbatch.examples, "train")
                with self.explained_out_of_memory(what, "a smaller tokens_per_microbatch"):
                    scored = self.score(microbatch, sums, "train")
                    (scored.loss / len(examples)).backward()
                losses.append(scored.output.losses[: len(microbatch.examples)])
        grad_norm = self.clip_gradient()
        if self.is_finite(sums.sum("loss/train"), grad_norm, [x for microbatch in microbatches for x in microbatch.examples], losses):
            self.optimizer.step()
            self.batch_counter += 1
            every = self.config.reference.update_every
            if every is not None and self.batch_counter % every == 0:
                self.move_reference(self.config.reference.mixup)
        self.optimizer.zero_grad(set_to_none=True)
        self.eval_metrics = {}  # they were the weights' before this step
        self.batches_given += 1
        if self.batches.ends_part(self.batches_given):
            self.move_reference(1.0)
        self.previous_counter, self.example_counter = self.example_counter, self.example_counter + len(examples)
        self.step_values = {"grad_norm": grad_norm, "lr": lr, "examples_per_second": len(examples) / (time.perf_counter() - started)}
        return sums

    @torch.no_grad()
    def move_reference(self, share: float) -> None:
        """pi_ref <- share pi + (1 - share) pi_ref, weight by weight: https://arxiv.org/abs/2404.09656, where share is called alpha."""
        for mine, theirs in zip(self.reference_model.parameters(), self.policy.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), share)

    def easy_to_hard(self) -> list[int]:
        """Numbers of the train examples by log pi(chosen) - log pi(rejected) of the policy as it is, largest first."""
        data, size = self.data["train"], self.config.eval_batch_size
        examples = sorted(next(data.epochs(self.seed, shuffle=False)), key=lambda example: data.lengths([example]))
        batches = [self.feeder.share(examples[start : start + size]) for start in range(0, len(examples), size)]
        found = []
        self.policy.eval()
        with torch.no_grad(), self.computing():
            for some, microbatch in self.prepared(batches, "train", "Ordering"):
                self.world.passes += 1
                scores = self.scorer(microbatch.batch).scores
                margins = (scores["chosen"].logps - scores["rejected"].logps).tolist()
                found += zip(margins, map(data.index, some))  # of a placeholder none
        by_rank = self.world.gather(found)[: self.data_rank[1]]
        return [index for _, index in sorted((pair for some in by_rank for pair in some), key=lambda pair: (-pair[0], pair[1]))]

    def learning_rate(self) -> float:
        """Of the next step: rises linearly over the first warmup_steps, as published. A step that was left out is none of the schedule."""
        return self.config.lr * min(1.0, (self.batch_counter + 1) / (self.config.warmup_steps + 1))

    def with_baseline(self, microbatches: Sequence[Microbatch]) -> Sequence[Microbatch]:
        """For an objective with z0, the mean over all ranks' examples of r(response to another prompt), at least 0: it is computed, and put
        into them, before any is scored, so that it depends neither on the ranks nor on how the batch is cut."""
        if not self.objective.needs_baseline:
            return microbatches
        baseline = self.baseline(microbatches, "train", "a smaller tokens_per_microbatch")
        return [microbatch.with_baseline(baseline) for microbatch in microbatches]

    def baseline(self, microbatches: Iterable[Microbatch], split: str, remedy: str) -> torch.Tensor:
        """z0 of these microbatches of all ranks, a scalar, nats."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for microbatch in microbatches:
                self.world.passes += 1
                with self.explained_out_of_memory(partial(self.described, microbatch.examples, split), remedy):
                    (score,) = self.scorer(microbatch.mismatched).scores.values()
                ratios = score.log_ratio[: len(microbatch.examples)]
                sums[0] += ratios.sum(dtype=torch.float64)
                sums[1] += len(ratios)
        total, count = self.reduce(sums)
        return (total / count).clamp(min=0)

    def score(self, microbatch: Microbatch, sums: MetricSums, split: str) -> Scored:
        """Loss and scores, and the metrics of those examples that count; `split` is train or eval."""
        self.world.passes += 1
        counted = len(microbatch.examples)
        scored = self.scorer(microbatch.batch, counted)
        metrics = example_metrics(scored.scores, scored.output, split)
        sums.add(metrics, counted)
        return scored

    @contextmanager
    def explained_out_of_memory(self, what: Callable[[], str], remedy: str) -> Iterator[None]:
        """Says what does not fit, and what to change: `remedy`, or what helps in any case."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            more = ", parallel.reduce_once_a_step=false" if self.sharded else ""
            raise RunError(
                f"out of memory on {self.device} with {what()}\n"
                f"try {remedy}, a smaller max_length, model.fsdp_policy_mp=bfloat16{more} or activation_checkpointing=true"
            ) from error

    def described(self, examples: list[Example], split: str) -> str:
        longest = max(self.data[split].lengths(examples), default=0)
        return f"{len(examples)} {split} examples, the longest of {longest} tokens, in step {self.batch_counter + 1}"

    def is_finite(self, loss: torch.Tensor, grad_norm: torch.Tensor, examples: list[Example], losses: list[torch.Tensor]) -> bool:
        """Whether to take the step: the same answer on all ranks. The one place in a step that waits for the device.

        Args:
            loss: this rank's sum.
            grad_norm: of all ranks' gradient.
            examples, losses: this rank's.

        Raises:
            RunError: loss or gradient are not finite, and max_skipped_steps such steps were left out already.
        """
        bad = torch.stack([~loss.isfinite(), ~grad_norm.isfinite().to(loss.device)]).int()
        bad_losses, bad_norm = self.world.sum(bad).tolist()
        if not bad_losses and not bad_norm:
            return True
        self.skipped_steps += 1
        term = "loss" if bad_losses else "gradient norm"
        finite = torch.cat(losses).isfinite().tolist() if bad_losses else [False] * len(examples)
        ids = [self.data["train"].element(example)["example_id"] for example, ok in zip(examples, finite) if not ok]
        by_rank = self.world.gather(ids)[: self.data_rank[1]]
        where = [some_of(ids, 8) if self.world.size == 1 else f"{some_of(ids, 8)} (rank {rank})" for rank, ids in enumerate(by_rank) if ids]
        message = f"step {self.batch_counter + self.skipped_steps}: the {term} is not finite; examples {'; '.join(where)}"
        with self.world.agreed():
            if self.skipped_steps > self.config.max_skipped_steps and self.world.is_first:
                raise RunError(
                    f"{message}\nstopped before the step was taken; a smaller lr or max_grad_norm, or model.policy_dtype=float32 may help "
                    "(max_skipped_steps leaves such steps out)"
                )
        tqdm.tqdm.write(f"{message}: left out ({self.skipped_steps} of {self.config.max_skipped_steps})")
        return False

    # --- eval and samples ---

    def evaluate(self) -> None:
        """Score the eval examples, each once, and sample for some of them where the config asks for it."""
        self.policy.eval()
        sums = MetricSums()
        batches = self.eval_batches()
        with torch.no_grad(), self.computing():
            baseline = None
            if self.objective.needs_baseline:  # that of the whole split, so that it does not depend on eval_batch_size
                prepared = self.prepared(batches, "eval", "Baseline")
                baseline = self.baseline((microbatch for _, microbatch in prepared), "eval", "a smaller eval_batch_size")
            for examples, microbatch in self.prepared(batches, "eval", "Evaluating"):
                microbatch = microbatch if baseline is None else microbatch.with_baseline(baseline)
                with self.explained_out_of_memory(partial(self.described, examples, "eval"), "a smaller eval_batch_size"):
                    self.score(microbatch, sums, "eval")
            metrics = sums.means(self.reduce)
            rows = self.sample(self.eval_examples[: self.config.n_eval_model_samples]) if self.config.sample_during_eval else []
        self.eval_metrics, self.evaluated_at = metrics, self.example_counter
        for sink in self.sinks:
            sink.log(metrics, "eval", self.example_counter)
            if rows:
                sink.samples(rows, self.example_counter)

    def prepared(self, batches: list[list[Example]], split: str, title: str) -> Iterator[tuple[list[Example], Microbatch]]:
        """(batch, microbatch) of each batch of this rank's, with a progress bar; ends where a signal asks for it."""
        found = ahead(partial(self.feeder.whole, split), batches)
        for item in tqdm.tqdm(found, title, len(batches), leave=False, disable=self.hide_progress):
            self.check_stop()
            yield item

    def eval_batches(self) -> list[list[Example]]:
        """This rank's parts of eval_batch_size examples each; those of like length together, so that little is padded."""
        data, size = self.data["eval"], self.config.eval_batch_size
        ordered = sorted(self.eval_examples, key=lambda example: data.lengths([example]))
        return [self.feeder.share(ordered[start : start + size]) for start in range(0, len(ordered), size)]

    def cache_reference(self) -> None:
        """Put the reference's hidden states on disk, unless they are there; then keep of the reference its head alone.

        They are computed in the microbatches of the first epoch and of an eval, so that with the same seed and cut of the batch these are
        the live reference's, bit by bit.

        Raises:
            UserError: scoring is plain, or the disk has not the space.
        """
        if not self.feeder.fast:
            raise UserError("reference_cache=true needs fast scoring, which this model rules out; set reference_cache=false")
        config = self.config
        whole = config.n_examples is None or config.n_examples >= len(self.data["train"])
        stream = BatchStream(self.data["train"], config.batch_size, self.seed, 1, drop_last=False) if whole else self.batches
        model = self.reference_model.config.get_text_config()
        identity = self.world.from_first(lambda: {"weights": self.reference_identity, "config": identity_of(self.reference_model.config)})
        examples = {"train": [example for batch in stream for example in batch], "eval": self.eval_examples}
        folder = self.world.from_first(lambda: os.path.abspath(get_local_dir(config.local_dirs)))
        caches = {
            split: ReferenceCache(folder, self.data[split], some, model.hidden_size, self.reference_model.dtype, identity)
            for split, some in examples.items()
        }
        microbatches = {
            "train": (microbatch[:2] for batch in stream for microbatch in self.feeder.train(batch)),
            "eval": (self.feeder.whole("eval", batch)[:2] for batch in self.eval_batches()),
        }
        for split, cache in caches.items():
            there = self.world.from_first(cache.is_there)
            print(f"reference cache, {split}: {cache.plan()}; {'found' if there else 'computing it'}")
            if not there:
                cache.fill(microbatches[split], self.scorer, self.world, self.check_stop, self.hide_progress)
            with self.world.agreed():
                cache.open()
        print("reference cache: from now on only the reference's head is in memory, and samples are the policy's alone")
        self.feeder.reference_caches, self.reference_model = caches, None
        self.scorer.reference = HeadOnly.instead_of(self.scorer.reference)

    def sample(self, examples: list[Example]) -> list[dict]:
        """One continuation of each prompt by the policy, and by the reference where there is one: {prompt, policy, reference}.

        Texts are whole, prompt included. Drawn from the model's own distribution (temperature 1, no top-k, no top-p), seeded by the run's
        seed, the number of train examples and the rank, so that they do not depend on what was drawn before.
        """
        models = {"policy": self.policy}
        if self.reference_model is not None:
            models["reference"] = self.reference_model
        rows = []
        rank, ranks = self.data_rank
        devices = [self.device] if self.device.type == "cuda" else []
        # Compiled blocks would be compiled anew for every length of the cache, until PyTorch gave up on them, for training too.
        with torch.random.fork_rng(devices=devices), self.gathered(), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(mixed_seed(self.seed, self.example_counter, rank))
            starts = tqdm.trange(0, len(examples), self.config.eval_batch_size, desc="Sampling", leave=False, disable=self.hide_progress)
            for start in starts:
                self.check_stop()
                some = examples[start : start + self.config.eval_batch_size]
                own = self.feeder.share(some)
                elements = [self.data["eval"].element(example) for example in own or some[:1]]
                batch = self.feeder.collated(elements)
                texts = {name: self.generate(model, batch) for name, model in models.items()}
                rows.append(
                    [{"prompt": e["prompt"], **{name: texts[name][i] for name in models}} for i, e in enumerate(elements[: len(own)])]
                )
        by_rank = self.world.gather(rows)[:ranks]
        return [row for batches in zip(*by_rank) for row in interleaved(batches)]

    def generate(self, model: nn.Module, batch: dict) -> list[str]:
        return generate(model, batch, self.generation_config, self.tokenizer, synced=self.world.size > 1)

    # --- logs and checkpoints ---

    def log_train(self, sums: MetricSums, progress: tqdm.tqdm) -> None:
        """Log the step's means over its global batch, at most once in minimum_log_interval_secs."""
        now = time.monotonic()
        waited = self.last_log is None or now - self.last_log >= self.config.minimum_log_interval_secs
        (due,) = self.world.maximum(waited and self.world.is_first)
        if not due:
            return
        self.last_log = now
        metrics = sums.means(self.reduce)
        metrics.update({name: float(value) for name, value in self.step_values.items()})
        metrics["counters/examples"] = self.example_counter
        metrics["counters/updates"] = self.batch_counter
        self.check_start(metrics)
        for sink in self.sinks:
            sink.log(metrics, "train", self.example_counter)
        shown = {"loss": f"{metrics['loss/train']:.4f}"}
        accuracy = metrics.get("rewards_train/accuracies", metrics.get("logits_train/accuracies"))
        if accuracy is not None:
            shown["accuracy"] = f"{accuracy:.2f}"
        progress.set_postfix(shown, refresh=False)

    def check_start(self, metrics: dict[str, float]) -> None:
        """At the first step policy and reference are the same model: say so where their scores differ."""
        if self.previous_counter != 0 or not self.objective.implicit_rewards:
            return
        beta = self.objective.hyperparameters["beta"]
        differences = {name: abs(metrics.get(name, 0.0)) for name in ("rewards_train/chosen", "rewards_train/rejected", "kl_train/chosen")}
        worst = max(differences["kl_train/chosen"], *(differences[f"rewards_train/{role}"] / beta for role in ("chosen", "rejected")))
        if worst > STEP_ZERO_TOLERANCE:
            tqdm.tqdm.write(f"warning: policy and reference differ before the first step, by {worst:.2g} nats: other dtypes or weights?")

    def save(self, final: bool = False) -> None:
        """Write a checkpoint, unless there is one of this step; the last one also as a Hugging Face folder."""
        if self.config.debug:
            return
        if self.saved_at != self.example_counter:
            state = whole_state(self.world, self.policy)
            self.checkpoint = save_checkpoint(
                self.world,
                self.run_dir,
                self.example_counter,
                state,
                self.eval_metrics,
                training_tensors(self.world, self.policy, self.optimizer, self.moving_reference),
                self.progress(),
                (lambda folder: self.export(folder, state)) if final else None,
            )
            self.saved_at = self.example_counter
            tqdm.tqdm.write(f"checkpoint: {self.checkpoint}")
        elif final:
            state = whole_state(self.world, self.policy)
            add_export(self.world, self.checkpoint, lambda folder: self.export(folder, state))
        with self.world.agreed():
            if self.config.keep_checkpoints is not None and self.world.is_first:
                remove_old(self.run_dir, self.config.keep_checkpoints, never=[self.resumed_from] if self.resumed_from else [])

    def export(self, folder: str, state: Mapping[str, torch.Tensor]) -> None:
        self.policy.save_pretrained(folder, state_dict=dict(state), is_main_process=True)
        self.tokenizer.save_pretrained(folder)

    def progress(self) -> dict[str, Any]:
        """What decides the future and is none, and what tells whether a run that goes on is this one."""
        return {
            "examples": self.example_counter,
            "previous_examples": self.previous_counter,
            "updates": self.batch_counter,
            "skipped_steps": self.skipped_steps,
            "batches": self.batches_given,
            "order": self.order,
            "evaluated_at": self.evaluated_at,
            "eval_metrics": self.eval_metrics,
            "ranks": self.ranks(),
            "wandb_id": next((sink.run_id for sink in self.sinks if hasattr(sink, "run_id")), self.wandb_id),
            "data": self.data_identity(),
            "reference": {"fingerprint": self.reference_identity, "archive": self.archive},
            "config": OmegaConf.to_container(self.config),
        }

    @property
    def moving_reference(self) -> Optional[nn.Module]:
        """The reference, where training changes it."""
        return self.reference_model if self.moves_reference else None

    def ranks(self) -> str:
        return f"{plural(self.world.size, 'process', 'processes')} on {self.device.type}"

    def data_identity(self) -> dict[str, str]:
        return {split: data.fingerprint for split, data in self.data.items()}

    def resume(self, resumed: Resumed) -> None:
        """Go on from a checkpoint, of whatever trainer and number of ranks."""
        progress = resumed.progress
        self.example_counter, self.previous_counter = progress["examples"], progress["previous_examples"]
        self.batch_counter, self.skipped_steps = progress["updates"], progress["skipped_steps"]
        self.batches_given, self.wandb_id = progress["batches"], progress["wandb_id"]
        self.order = progress.get("order")
        self.evaluated_at, self.eval_metrics = progress["evaluated_at"], progress["eval_metrics"]
        self.saved_at, self.checkpoint, self.resumed_from = progress["examples"], resumed.folder, resumed.folder
        self.archive = archive_of(resumed, self.config.model.archive)
        same_ranks = progress["ranks"] == self.ranks()
        restore_tensors(self.world, resumed.folder, self.policy, self.optimizer, self.moving_reference, with_random=same_ranks)
        if not same_ranks:
            torch.manual_seed(mixed_seed(self.seed, self.batches_given, self.world.rank))
            print(f"until now {progress['ranks']}, from now {self.ranks()}: random numbers start anew from seed, step and rank")

    # --- what depends on the device: overridden for several of them ---

    @classmethod
    def check_model(cls, policy: nn.Module, config: DictConfig, world: World) -> None:
        """Raises UserError where this trainer cannot train such a model; weights play no part."""

    @property
    def data_rank(self) -> tuple[int, int]:
        """(i, n): this process works on part i of n of every batch."""
        return 0, 1

    def place(self, scorer: Scorer, weights: Mapping[str, Callable[[], nn.Module]]) -> Scorer:
        """Policy and reference, where they will compute."""
        if scorer.reference is not None:
            self.reference_identity = fingerprint(scorer.reference)
        return scorer.to(self.device)

    def computing(self) -> AbstractContextManager:
        """Within it the policy computes in `compute_dtype`."""
        return cast_parameters(self.policy, self.compute_dtype)

    def gathered(self) -> AbstractContextManager:
        """Within it policy and reference can be called by themselves."""
        return nullcontext()

    def before_backward(self, is_last: bool) -> None:
        """`is_last`: of the step's microbatches."""

    def reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the parts of the data that other processes have."""
        return sums

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """What an optimizer may treat together."""
        return [list(self.policy.parameters())]

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = getattr(torch.optim, self.config.optimizer)
        fused = self.device.type == "cuda" and "fused" in inspect.signature(optimizer).parameters
        try:
            groups = [{"params": group} for group in self.parameter_groups()]
            return optimizer(groups, lr=self.config.lr, **({"fused": True} if fused else {}))
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer={self.config.optimizer} does not take this model: {error}") from None

    def clip_gradient(self) -> torch.Tensor:
        """Scale the gradient down to max_grad_norm; its norm before, a scalar on the device."""
        return full_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm))


class FSDPTrainer(BasicTrainer):
    """Trains on several devices, on one or many nodes: each holds a shard of policy, reference, gradients and optimizer state (FSDP2)."""

    sharded = True

    @classmethod
    def check_model(cls, policy: nn.Module, config: DictConfig, world: World) -> None:
        find_blocks(policy, config.model.block_name)

    @property
    def data_rank(self) -> tuple[int, int]:
        return self.world.rank, self.world.size

    def place(self, scorer: Scorer, weights: Mapping[str, Callable[[], nn.Module]]) -> Scorer:
        model = self.config.model
        mesh = self.world.mesh(self.config.parallel.replicas)
        shard_scorer(scorer, mesh, model.block_name, self.compute_dtype, DTYPES[model.policy_dtype])
        load_weights(self.world, scorer.policy, weights["policy"])
        if scorer.reference is not None:
            self.reference_identity = load_weights(self.world, scorer.reference, weights["reference"])
        return scorer

    @contextmanager
    def computing(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.scorer.reshard()  # the wrapper's own unit stays gathered after a forward pass

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The wrapper's own unit (embeddings, head); blocks are gathered one after another as they compute."""
        self.scorer.unshard()
        try:
            yield
        finally:
            self.scorer.reshard()

    def before_backward(self, is_last: bool) -> None:
        if self.config.parallel.reduce_once_a_step:
            self.scorer.set_requires_gradient_sync(is_last)

    def reduce(self, sums: torch.Tensor) -> torch.Tensor:
        return self.world.sum(sums)


class TensorParallelTrainer(BasicTrainer):
    """Trains on several devices that hold and multiply a part of every matrix each, and all work on the whole batch."""

    sharded = True

    @classmethod
    def check_model(cls, policy: nn.Module, config: DictConfig, world: World) -> None:
        tensor_parallel_plan(policy, world.size)

    def place(self, scorer: Scorer, weights: Mapping[str, Callable[[], nn.Module]]) -> Scorer:
        mesh = self.world.mesh()
        partial = split_matrices(scorer.policy, mesh)
        load_weights(self.world, scorer.policy, weights["policy"])
        self.partial = [parameter for name, parameter in scorer.policy.named_parameters() if name in partial]
        if scorer.reference is not None:
            split_matrices(scorer.reference, mesh)
            self.reference_identity = load_weights(self.world, scorer.reference, weights["reference"])
        return scorer

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Split ones, and whole ones: neither optimizers nor norms take both together."""
        groups = [], []
        for parameter in self.policy.parameters():
            groups[isinstance(parameter, DTensor)].append(parameter)
        return [group for group in groups if group]

    def clip_gradient(self) -> torch.Tensor:
        for parameter in self.partial:
            self.world.sum(parameter.grad)
        groups = self.parameter_groups()
        norms = [full_tensor(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, self.config.max_grad_norm, norm)
        return norm
