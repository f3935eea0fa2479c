"""The training loop: `train` only schedules, `train_step` is one optimizer step.

A strategy (tdpo/training/strategies.py) holds what differs between one device and several; hooks (tdpo/training/hooks.py) add to the loop.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Optional

import torch
import tqdm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tdpo.checkpointing.resume import Resumed, archive_of, command_of
from tdpo.checkpointing.training_state import Progress, restore_tensors, training_tensors
from tdpo.data.batching import batches_of, get_collate_fn, prefetched
from tdpo.data.split import EVAL_SEED, Example, TokenizedSplit
from tdpo.distributed.signals import StopSignals
from tdpo.distributed.world import World
from tdpo.losses import Objective, preference_loss, tdpo_loss
from tdpo.models.adapters import has_adapters
from tdpo.models.export import export_policy, model_card
from tdpo.models.sampling import continuations, interleaved, mixed_seed, own_distribution
from tdpo.optimizers import make_optimizer
from tdpo.scoring.head import HeadOnly
from tdpo.scoring.logps import _get_batch_logps, _tdpo_get_batch_logps, concatenated_inputs
from tdpo.scoring.scorer import Scored, Scorer
from tdpo.training.adapter_files import AdapterFiles
from tdpo.training.feeder import Feeder, Microbatch
from tdpo.training.guards import Guards, PublishedMethods
from tdpo.training.hooks import make_hooks
from tdpo.training.limits import Limits
from tdpo.training.metrics import MetricSums, example_metrics, metrics_of_datasets
from tdpo.training.pace import Pace
from tdpo.training.passes import Passes
from tdpo.training.saver import Saver
from tdpo.training.schedule import Schedule
from tdpo.training.sinks import Sink
from tdpo.training.strategies import FullySharded, SingleDevice, TensorParallel, Weights, prepare_blocks, without_randomness
from tdpo.utils import Stopped, get_local_dir, get_logger, plural, seed_generators

# Forks of the published code import preference_loss and the names after it from trainers.
__all__ = ["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer", "preference_loss", "tdpo_loss"]
__all__ += ["_get_batch_logps", "_tdpo_get_batch_logps", "concatenated_inputs"]

log = get_logger(__name__)


class BasicTrainer(PublishedMethods):
    """Trains on one device: a GPU if there is one, else the CPU.

    Args:
        policy: the model to train. BasicTrainer: on the CPU; the other trainers: on the meta device, without weights.
        config: a checked config.
        seed: random seed of the data order and of sampling.
        run_dir: an existing folder for checkpoints.
        reference_model: the reference, on the same device as the policy; None if the objective needs none.
        objective: the loss, with its hyperparameters.
        train_data, eval_data: tokenized splits.
        tokenizer: pads, and decodes samples.
        sinks: where metrics and samples are logged; may be filled until `train` is called. Empty on all ranks but 0.
        world: the ranks that train together; None: a single process.
        weights: for models on the meta device: functions "policy" and "reference" that build them with weights; called on rank 0.
    """

    strategy_class = SingleDevice

    def __init__(
        self,
        policy: nn.Module,
        config: DictConfig,
        seed: int,
        run_dir: str,
        reference_model: Optional[nn.Module] = None,
        *,
        objective: Objective,
        train_data: TokenizedSplit,
        eval_data: TokenizedSplit,
        tokenizer,
        sinks: list[Sink],
        world: Optional[World] = None,
        weights: Optional[Weights] = None,
    ):
        self.config, self.seed, self.run_dir, self.objective = config, seed, run_dir, objective
        self.tokenizer, self.sinks, self.world = tokenizer, sinks, world or World()
        self.data = {"train": train_data, "eval": eval_data}
        prepare_blocks(config, policy, reference_model)
        self.strategy = self.strategy_class(config, self.world)
        self.guards = Guards(config, self.data, self.strategy, self.world)
        self.scorer = Scorer(policy, reference_model, objective, config.compile)
        self.reference_fingerprint = self.strategy.place(self.scorer, weights or {})
        self.policy = self.scorer.policy
        self.batches = batches_of(config, objective.stages, train_data)
        self.schedule = Schedule.of(config, len(self.batches))
        self.pace = Pace(self.world.device, len(self.batches) * config.batch_size)
        self.eval_examples = next(eval_data.epochs(EVAL_SEED))[: config.n_eval_examples]
        fast, packing = self.guards.choose_scoring(self.scorer)
        self.feeder = Feeder(
            self.data,
            get_collate_fn(tokenizer),
            self.world.device,
            self.strategy.data_rank,
            microbatches=config.gradient_accumulation_steps,
            budget=config.tokens_per_microbatch,
            placeholders={"train": next(iter(self.batches))[0], "eval": self.eval_examples[0]},
            fast=fast,
            packing=packing,
            mismatched=objective.needs_kl_baseline,
        )
        self.signals = StopSignals(self.world)
        self.passes = Passes(self.scorer, self.feeder, self.strategy, self.world, self.signals)
        with self.world.agreed():
            options, groups = OmegaConf.to_container(config.optimizer_options), self.strategy.parameter_groups()
            given = config.optimizer, groups, config.lr, options, config.decay_norms_and_biases, self.world.device
            self.optimizer = make_optimizer(*given)
        self.generation_config = own_distribution(tokenizer, config.max_length)
        self.progress = Progress()
        self.archive = archive_of(None, config.model.archive)
        files = AdapterFiles(self.world, self.policy, config.model, run_dir) if has_adapters(self.policy) else None
        self.saver = Saver(self.world, run_dir, config, files)
        hooks = make_hooks(config, objective, self.passes, self.batches, self.eval_examples, self.reference_fingerprint)
        self.hooks = [*hooks, Limits(config, self.saver)]
        self.last_log: Optional[float] = None
        self.step_values: dict[str, Any] = {}  # grad_norm, lr and pace of the last step
        seed_generators(seed)

    # --- schedule ---
    def train(self) -> None:
        """Train on all batches, with evals, logs and checkpoints on schedule, and an eval and a checkpoint at the end.

        Raises:
            Stopped, RunError: a signal asked the run to end, and the last step was saved; a step was not finite, or memory ran out.
        """
        with self.signals, self.progress_bar() as bar:
            try:
                for hook in self.hooks:
                    hook.before_training()
                # A thread prepares the next batch's microbatches during a step; `prefetched` yields (examples, microbatches).
                for examples, microbatches in prefetched(self.feeder.train_microbatches, self.batches.after(self.progress.batches)):
                    self.between_steps()
                    if reason := "; ".join(filter(None, (hook.reason_to_stop(self.progress) for hook in self.hooks))):
                        log.info(f"the run ends after {self.progress.examples:,} examples, by stop_when: {reason}")
                        break
                    sums = self.train_step(examples, microbatches)
                    self.log_train(sums, bar)
                    bar.update(len(examples))
                if self.progress.evaluated_at != self.progress.examples:
                    self.evaluate()
                self.save(final=True)
                self.guards.check_last_eval(self.progress, self.saver)
            except Stopped:
                self.save()
                raise
            except torch.OutOfMemoryError as error:
                raise self.guards.out_of_memory_in_pass(self.passes.current, self.progress) from error

    def progress_bar(self) -> tqdm.tqdm:
        total = len(self.batches) * self.config.batch_size
        hide = self.passes.hide_progress
        return tqdm.tqdm(total=total, initial=self.progress.examples, desc="Training", unit=" examples", disable=hide)

    def between_steps(self) -> None:
        """Raise Stopped after a signal; evaluate and save if due. A resumed run does not repeat the eval of its checkpoint."""
        self.signals.check()
        config, progress = self.config, self.progress
        evaluated = progress.evaluated_at == progress.examples
        if self.is_due(config.eval_every) and not evaluated and (progress.examples > 0 or config.do_first_eval):
            self.evaluate()
        wanted = self.is_due(config.save_every or config.eval_every) or any(hook.wants_checkpoint(progress) for hook in self.hooks)
        if progress.examples > 0 and wanted:
            self.save()

    def is_due(self, every: int) -> bool:
        """Whether the last step has reached or passed a multiple of `every` train examples; true before the first step."""
        return self.progress.examples // every > self.progress.previous_examples // every

    # --- one step ---
    def train_step(self, examples: list[Example], microbatches: list[Microbatch]) -> MetricSums:
        """Train on one global batch: one optimizer step, or none if it is not finite. Return the metric sums of this rank's examples.

        Args:
            examples: the global batch, of all ranks.
            microbatches: this rank's shard of it.
        """
        without_randomness(self.policy)
        started = time.perf_counter()
        sums, losses = MetricSums(), []
        lr = self.schedule(self.progress.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.strategy.forward_context():
            for hook in self.hooks:
                microbatches = list(hook.before_scoring(microbatches, "train"))
            for i, microbatch in enumerate(microbatches):
                self.strategy.before_backward(is_last=i == len(microbatches) - 1)
                scored = self.score(microbatch, sums, "train")  # if fast, this computes the head's gradients too (scoring/chunked_loss.py)
                (scored.loss / len(examples)).backward()  # gives the global mean: ranks' gradients are summed (distributed/sharding.py)
                losses.append(scored.output.losses[: len(microbatch.examples)])  # a rank without examples scores a placeholder, not counted
        grad_norm = self.strategy.clip_gradient(self.config.max_grad_norm)
        own = [example for microbatch in microbatches for example in microbatch.examples]
        took_step = self.guards.may_take_step(sums.sum("loss/train"), grad_norm, own, losses, self.progress, self.saver.doubt)
        if took_step:
            self.optimizer.step()
            self.saver.step_followed()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.advance(len(examples), took_step)
        for hook in self.hooks:
            hook.after_step(self.progress, took_step)
        tokens, seconds = sum(self.data["train"].lengths(examples)), time.perf_counter() - started
        pace = self.pace.after_step(len(examples), tokens, seconds, self.progress.examples)
        self.step_values = {"grad_norm": grad_norm, "lr": lr, **pace}
        return sums

    def score(self, microbatch: Microbatch, sums: MetricSums, split: str) -> Scored:
        """Score a microbatch, and add the metrics of its examples to `sums`. `split` is train or eval."""
        scored = self.passes.score(microbatch, split)
        sums.add(example_metrics(scored.scores, scored.output, split), len(microbatch.examples))
        if split == "eval":
            names, own = self.data[split].names, self.data[split].dataset_of(microbatch.examples)
            sums.add(metrics_of_datasets(scored.scores, scored.output, split, names, own))
        return scored

    # --- eval and samples ---
    def evaluate(self) -> None:
        """Evaluate on the eval examples, each once; sample for some of their prompts if the config asks for it."""
        self.policy.eval()
        sums = MetricSums()
        batches = self.feeder.batches("eval", self.eval_examples, self.config.eval_batch_size)
        with torch.no_grad(), self.strategy.forward_context():
            microbatches = self.passes.prepared("eval", batches, "Evaluating")
            for hook in self.hooks:
                microbatches = hook.before_scoring(microbatches, "eval")
            for microbatch in microbatches:
                self.score(microbatch, sums, "eval")
            metrics = sums.means(self.strategy.reduce)
            rows = self.sample(self.eval_examples[: self.config.n_eval_model_samples]) if self.config.sample_during_eval else []
        self.progress.eval_metrics, self.progress.evaluated_at = metrics, self.progress.examples
        with self.world.agreed():
            for sink in self.sinks:
                sink.log(metrics, "eval", self.progress.examples)
                if rows:
                    sink.samples(rows, self.progress.examples)
        self.guards.warn_of_eval(metrics)
        for hook in self.hooks:
            hook.after_eval(self.progress)

    @property
    def reference_model(self) -> Optional[nn.Module]:
        """The reference model; None if the objective needs none, or if its hidden states are cached (only its head is left)."""
        return None if isinstance(self.scorer.reference, HeadOnly) else self.scorer.reference

    def sample(self, examples: list[Example]) -> list[dict]:
        """Sample one text per prompt, prompt included, from the policy and, if there is one, the reference: {prompt, policy, reference}.

        Texts are drawn from the model's own distribution (temperature 1, no top-k, no top-p). The random seed is made of `seed`, the train
        examples so far and the rank. All ranks must call this, and all get the list.
        """
        models = {"policy": self.policy, "reference": self.reference_model}
        rank, ranks = self.strategy.data_rank
        rows = []
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        # Not compiled: each length of the cache would recompile the blocks; after too many, PyTorch gives up, for training too.
        with torch.random.fork_rng(devices=devices), self.strategy.gathered(), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(mixed_seed(self.seed, self.progress.examples, rank))
            starts = range(0, len(examples), self.config.eval_batch_size)
            for start in tqdm.tqdm(starts, desc="Sampling", leave=False, disable=self.passes.hide_progress):
                self.signals.check()
                some = examples[start : start + self.config.eval_batch_size]
                own = self.feeder.shard(some)
                elements = [self.data["eval"].element(example) for example in own or some[:1]]
                prompts = [element["prompt_input_ids"] for element in elements]
                texts = {name: self.generate(model, prompts) for name, model in models.items() if model is not None}
                rows.append(
                    [{"prompt": e["prompt"], **{name: texts[name][i] for name in texts}} for i, e in enumerate(elements[: len(own)])]
                )
        by_rank = self.world.gather(rows)[:ranks]
        return [row for batches in zip(*by_rank) for row in interleaved(batches)]

    def generate(self, model: nn.Module, prompts: list[list[int]]) -> list[str]:
        """Return one sampled text, prompt included, for each prompt (token ids)."""
        drawn = continuations(model, prompts, 1, self.generation_config, synced=self.world.size > 1)
        whole = [[*prompt, *ids] for prompt, (ids,) in zip(prompts, drawn)]
        return self.tokenizer.batch_decode(whole, skip_special_tokens=True)

    # --- logs and checkpoints ---
    def log_train(self, sums: MetricSums, bar: tqdm.tqdm) -> None:
        """Log the means over the step's global batch, at most once every minimum_log_interval_secs seconds."""
        now = time.monotonic()
        waited = self.last_log is None or now - self.last_log >= self.config.minimum_log_interval_secs
        (due,) = self.world.maximum(waited and self.world.is_first)
        if not due:
            return
        self.last_log = now
        metrics = sums.means(self.strategy.reduce)
        metrics.update({name: float(value) for name, value in self.step_values.items()})
        metrics["counters/examples"] = self.progress.examples
        metrics["counters/updates"] = self.progress.updates
        if self.progress.previous_examples == 0 and self.objective.implicit_rewards:
            self.guards.warn_of_start(metrics, self.objective.reward_scale)
        with self.world.agreed():
            for sink in self.sinks:
                sink.log(metrics, "train", self.progress.examples)
        shown = {"loss": f"{metrics['loss/train']:.4f}"}
        accuracy = metrics.get("rewards_train/accuracies", metrics.get("logits_train/accuracies"))
        if accuracy is not None:
            shown["accuracy"] = f"{accuracy:.2f}"
        bar.set_postfix(shown, refresh=False)

    def save(self, final: bool = False) -> None:
        """Write a checkpoint if this step has none yet, then remove old ones (keep_checkpoints). `final` adds a Hugging Face folder."""
        if not self.config.debug:
            self.saver.save(self.policy, self.training_tensors, self.snapshot(), self.export, final)

    def training_tensors(self) -> dict[str, dict]:
        """Return what resuming needs, see training_state.py."""
        return training_tensors(self.world, self.policy, self.optimizer, self.moving_reference)

    def export(self, folder: str, state: Mapping[str, torch.Tensor]) -> None:
        """Write policy and tokenizer into a Hugging Face folder.

        Args:
            state: the policy's whole state dict.
        """
        cache_dir = get_local_dir(self.config.local_dirs)
        card = model_card(self.config, self.snapshot(), command_of(self.run_dir), cache_dir)
        export_policy(self.policy, self.tokenizer, folder, state, self.config.model, cache_dir, card)

    def snapshot(self) -> dict[str, Any]:
        """Return Progress as a JSON-serializable dict: counters, the hooks' state, and what identifies the run."""
        return asdict(
            replace(
                self.progress,
                hooks={type(hook).__name__: state for hook in self.hooks if (state := hook.state())},
                ranks=self.ranks(),
                wandb_id=next((sink.run_id for sink in self.sinks if hasattr(sink, "run_id")), self.progress.wandb_id),
                data={split: data.fingerprint for split, data in self.data.items()},
                reference={"fingerprint": self.reference_fingerprint, "archive": self.archive},
                config=OmegaConf.to_container(self.config),
            )
        )

    @property
    def moving_reference(self) -> Optional[nn.Module]:
        """The reference if a hook changes its weights (checkpoints must then contain it); else None."""
        return self.reference_model if any(hook.moves_reference for hook in self.hooks) else None

    def ranks(self) -> str:
        """Return the number of processes and the kind of device, for logs and checkpoints."""
        return f"{plural(self.world.size, 'process', 'processes')} on {self.world.device.type}"

    def resume(self, resumed: Resumed) -> None:
        """Load a checkpoint, which may come from another trainer or number of ranks. Call it before `train`."""
        self.progress = replace(resumed.progress)
        for hook in self.hooks:
            if state := resumed.progress.hooks.get(type(hook).__name__):
                hook.restore(state)
        self.saver.resume(resumed.folder, self.progress.examples)
        same_ranks = resumed.progress.ranks == self.ranks()
        restore_tensors(self.world, resumed.folder, self.policy, self.optimizer, self.moving_reference, with_random=same_ranks)
        if not same_ranks:
            torch.manual_seed(mixed_seed(self.seed, self.progress.batches, self.world.rank))
            log.info(f"now {self.ranks()}, before {resumed.progress.ranks}: PyTorch's random numbers start anew, from seed, batch and rank")


class FSDPTrainer(BasicTrainer):
    """Trains on several devices, on one or more nodes; each holds a shard of policy, reference, gradients and optimizer state (FSDP2)."""

    strategy_class = FullySharded


class TensorParallelTrainer(BasicTrainer):
    """Trains on several devices; each holds a part of the matrices that Transformers' plan splits. All work on the whole batch."""

    strategy_class = TensorParallel
