"""The training loop.

`train` only schedules: `train_step` is one optimizer step, `evaluate`, `sample`, `log` and `save` do what their names say. What
differs between devices is in a few methods at the end that a subclass overrides: no loop is written twice.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import numpy as np
import torch
import tqdm
import transformers
from omegaconf import DictConfig, OmegaConf
from torch import nn

from batching import BatchStream, Example, TokenizedSplit, get_collate_fn
from checkpoints import save_checkpoint
from losses import LossOutput, get_objective, preference_loss, tdpo_loss
from metrics import MetricSums, Sink, example_metrics
from scoring import PlainScorer, _get_batch_logps, _tdpo_get_batch_logps, cast_parameters, concatenated_inputs
from utils import DTYPES, RunError, UserError, some_of

# preference_loss and the next ones are here for forks of the published code that import them from trainers.
__all__ = ["BasicTrainer", "preference_loss", "tdpo_loss", "_get_batch_logps", "_tdpo_get_batch_logps", "concatenated_inputs"]

EVAL_SEED = 0  # of the eval order, whatever the run's seed, so that runs of different seeds see the same eval pairs
STEP_ZERO_TOLERANCE = 1e-3  # nats: far above rounding, far below what one step of training does


class BasicTrainer:
    """Trains on one device: a GPU if there is one, else the CPU.

    Args:
        policy: the model to train, on the CPU.
        config: a checked config.
        seed: of the order of the train data and of sampling.
        run_dir: an existing folder for checkpoints.
        reference_model: frozen; None where the loss needs none.
        train_data, eval_data: tokenized splits.
        tokenizer: to pad, and to decode samples.
        sinks: where metrics and samples go.
    """

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
    ):
        self.config, self.seed, self.run_dir = config, seed, run_dir
        self.data = {"train": train_data, "eval": eval_data}
        self.tokenizer, self.sinks = tokenizer, sinks
        self.collate = get_collate_fn(tokenizer)
        self.device = self.choose_device()
        loss = OmegaConf.to_container(config.loss)
        self.objective = get_objective(loss.pop("name"), **loss)
        self.policy, self.reference_model = self.place(policy), self.place(reference_model)
        self.scorer = PlainScorer(self.policy, self.reference_model, self.objective)
        mp = config.model.fsdp_policy_mp
        self.compute_dtype = DTYPES[mp] if mp not in (None, config.model.policy_dtype) else None
        if config.activation_checkpointing:
            # Its name before Transformers 5.23, and since.
            enable = getattr(self.policy, "activation_checkpointing_enable", self.policy.gradient_checkpointing_enable)
            enable({"use_reentrant": False})

        self.batches = BatchStream(train_data, config.batch_size, seed, config.n_epochs, config.n_examples, config.drop_last)
        # Not the model's own: it may bring penalties, or a temperature.
        self.generation_config = transformers.GenerationConfig(
            max_length=config.max_length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        eval_order = next(eval_data.epochs(EVAL_SEED))
        self.eval_examples = eval_order[: config.n_eval_examples]
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / (config.warmup_steps + 1)))
        self.example_counter = self.batch_counter = self.skipped_steps = 0
        self.previous_counter = -1  # example_counter before the last step
        self.eval_metrics: dict[str, float] = {}
        self.last_log: Optional[float] = None

    # --- schedule ---

    def train(self) -> None:
        """Train on every batch, with evals, logs and checkpoints in between; one eval and one checkpoint at the end."""
        torch.manual_seed(self.seed)
        np.random.seed(self.seed)
        random.seed(self.seed)
        config = self.config
        total = len(self.batches)
        with tqdm.tqdm(total=total * config.batch_size, desc="Training", unit=" examples", disable=None) as progress:
            for batch in self.batches:
                if self.is_due(config.eval_every) and (self.example_counter > 0 or config.do_first_eval):
                    self.evaluate()
                if self.example_counter > 0 and self.is_due(config.save_every or config.eval_every):
                    self.save()
                metrics = self.train_step(batch)
                self.log_train(metrics, progress)
                progress.update(len(batch))
        self.evaluate()
        self.save(final=True)

    def is_due(self, every: int) -> bool:
        """Whether the last step has reached or passed a multiple of `every` train examples; true before the first step."""
        return self.example_counter // every > self.previous_counter // every

    # --- one step ---

    def train_step(self, examples: list[Example]) -> MetricSums:
        """One optimizer step on one global batch: the gradient is the sum over its examples, divided by their number."""
        self.policy.train()
        started = time.perf_counter()
        sums = MetricSums()
        losses = []
        with cast_parameters(self.policy, self.compute_dtype):
            for microbatch in self.microbatches(examples):
                with self.explained_out_of_memory(microbatch, "train"):
                    output = self.score(microbatch, sums, "train")
                    (output.losses.sum() / len(examples)).backward()
                losses.append(output.losses.detach())
        grad_norm = self.clip_gradient()
        lr = self.scheduler.get_last_lr()[0]
        if self.is_finite(sums.sum("loss/train"), grad_norm, examples, losses):
            self.optimizer.step()
            self.scheduler.step()
            self.batch_counter += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.eval_metrics = {}  # they were the weights' before this step
        self.previous_counter, self.example_counter = self.example_counter, self.example_counter + len(examples)
        self.step_values = {"grad_norm": grad_norm, "lr": lr, "examples_per_second": len(examples) / (time.perf_counter() - started)}
        return sums

    def microbatches(self, examples: list[Example]) -> list[list[Example]]:
        """The batch in gradient_accumulation_steps parts, whose sizes differ by one at most."""
        parts = np.array_split(np.arange(len(examples)), self.config.gradient_accumulation_steps)
        return [[examples[i] for i in part] for part in parts if len(part)]

    def score(self, examples: list[Example], sums: MetricSums, split: str) -> LossOutput:
        """Losses and metrics of some examples; `split` is train or eval."""
        data = self.data[split]
        scores = self.scorer(self.to_device(self.collate([data.element(example) for example in examples])))
        output = self.objective(scores)
        sums.add(example_metrics(scores, output, split))
        return output

    @contextmanager
    def explained_out_of_memory(self, examples: list[Example], split: str) -> Iterator[None]:
        """What to change where these examples do not fit."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            longest = max(len(self.data[split].element(example)["chosen_input_ids"]) for example in examples)
            key = "larger gradient_accumulation_steps" if split == "train" else "smaller eval_batch_size"
            raise RunError(
                f"step {self.batch_counter + 1}: out of memory on {self.device} with {len(examples)} {split} examples, the longest of "
                f"{longest} tokens\ntry a {key}, a smaller max_length, model.fsdp_policy_mp=bfloat16 or activation_checkpointing=true"
            ) from error

    def to_device(self, batch: dict) -> dict:
        """Token ids and masks go to the device; labels stay, so that finding the response tokens does not wait for it."""
        return {k: v.to(self.device, non_blocking=True) if k.endswith(("_input_ids", "_mask")) else v for k, v in batch.items()}

    def is_finite(self, loss: torch.Tensor, grad_norm: torch.Tensor, examples: list[Example], losses: list[torch.Tensor]) -> bool:
        """Whether to take the step. The one place in a step that waits for the device.

        Raises:
            RunError: loss or gradient are not finite, and max_skipped_steps such steps were left out already.
        """
        loss_is_finite, norm_is_finite = torch.stack([loss.isfinite(), grad_norm.isfinite().to(loss.device)]).tolist()
        if loss_is_finite and norm_is_finite:
            return True
        self.skipped_steps += 1
        term = "gradient norm" if loss_is_finite else "loss"
        finite = torch.cat(losses).isfinite().tolist()
        bad = [example for example, ok in zip(examples, finite) if not ok] or examples
        ids = some_of([self.data["train"].element(example)["example_id"] for example in bad], 8)
        message = f"step {self.batch_counter + 1}: the {term} is not finite; examples {ids}"
        if self.skipped_steps > self.config.max_skipped_steps:
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
        size = self.config.eval_batch_size
        sums = MetricSums()
        with torch.no_grad(), cast_parameters(self.policy, self.compute_dtype):
            for start in tqdm.trange(0, len(self.eval_examples), size, desc="Evaluating", leave=False, disable=None):
                examples = self.eval_examples[start : start + size]
                with self.explained_out_of_memory(examples, "eval"):
                    self.score(examples, sums, "eval")
            self.eval_metrics = sums.means()
            for sink in self.sinks:
                sink.log(self.eval_metrics, "eval", self.example_counter)
            if self.config.sample_during_eval:
                rows = self.sample(self.eval_examples[: self.config.n_eval_model_samples])
                for sink in self.sinks:
                    sink.samples(rows, self.example_counter)

    def sample(self, examples: list[Example]) -> list[dict]:
        """One continuation of each prompt by the policy, and by the reference where there is one: {prompt, policy, reference}.

        Texts are whole, prompt included. Drawn from the model's own distribution (temperature 1, no top-k, no top-p), seeded by the run's
        seed and the number of train examples, so that they do not depend on what was drawn before.
        """
        models = {"policy": self.policy}
        if self.reference_model is not None:
            models["reference"] = self.reference_model
        rows = []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed + self.example_counter)
            starts = tqdm.trange(0, len(examples), self.config.eval_batch_size, desc="Sampling", leave=False, disable=None)
            for start in starts:
                elements = [self.data["eval"].element(example) for example in examples[start : start + self.config.eval_batch_size]]
                batch = self.to_device(self.collate(elements))
                texts = {name: self.generate(model, batch) for name, model in models.items()}
                rows += [{"prompt": e["prompt"], **{name: texts[name][i] for name in models}} for i, e in enumerate(elements)]
        return rows

    def generate(self, model: nn.Module, batch: dict) -> list[str]:
        own, model.generation_config = model.generation_config, self.generation_config
        try:
            output = model.generate(input_ids=batch["prompt_input_ids"], attention_mask=batch["prompt_attention_mask"])
        finally:
            model.generation_config = own
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)

    # --- logs and checkpoints ---

    def log_train(self, sums: MetricSums, progress: tqdm.tqdm) -> None:
        """Log the step's means over its global batch, at most once in minimum_log_interval_secs."""
        now = time.monotonic()
        if self.last_log is not None and now - self.last_log < self.config.minimum_log_interval_secs:
            return
        self.last_log = now
        metrics = sums.means()
        metrics.update({name: float(value) for name, value in self.step_values.items()})
        metrics["counters/examples"] = self.example_counter
        metrics["counters/updates"] = self.batch_counter
        self.check_start(metrics)
        for sink in self.sinks:
            sink.log(metrics, "train", self.example_counter)
        shown = {"loss": f"{metrics['loss/train']:.4f}"}
        if "rewards_train/accuracies" in metrics:
            shown["accuracy"] = f"{metrics['rewards_train/accuracies']:.2f}"
        progress.set_postfix(shown, refresh=False)

    def check_start(self, metrics: dict[str, float]) -> None:
        """At the first step policy and reference are the same model: say so where their scores differ."""
        if self.previous_counter != 0 or "rewards_train/chosen" not in metrics:
            return
        beta = self.objective.hyperparameters["beta"]
        differences = {name: abs(metrics.get(name, 0.0)) for name in ("rewards_train/chosen", "rewards_train/rejected", "kl_train/chosen")}
        worst = max(differences["kl_train/chosen"], *(differences[f"rewards_train/{role}"] / beta for role in ("chosen", "rejected")))
        if worst > STEP_ZERO_TOLERANCE:
            tqdm.tqdm.write(f"warning: policy and reference differ before the first step, by {worst:.2g} nats: other dtypes or weights?")

    def save(self, final: bool = False) -> None:
        """Write a checkpoint; the last one also as a Hugging Face folder."""
        if self.config.debug:
            return
        export = self.export if final else None
        folder = save_checkpoint(self.run_dir, self.example_counter, self.policy_state(), self.eval_metrics, export)
        tqdm.tqdm.write(f"checkpoint: {folder}")

    def export(self, folder: str) -> None:
        self.policy.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    # --- what depends on the device: overridden for several of them ---

    def choose_device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def place(self, model: Optional[nn.Module]) -> Optional[nn.Module]:
        """The model, where it will compute."""
        return None if model is None else model.to(self.device)

    def make_optimizer(self) -> torch.optim.Optimizer:
        try:
            return getattr(torch.optim, self.config.optimizer)(self.policy.parameters(), lr=self.config.lr)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer={self.config.optimizer} does not take this model: {error}") from None

    def clip_gradient(self) -> torch.Tensor:
        """Scale the gradient down to max_grad_norm; its norm before, a scalar on the device."""
        return torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)

    def policy_state(self) -> dict[str, torch.Tensor]:
        return self.policy.state_dict()
