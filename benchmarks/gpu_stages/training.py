"""Stages "trainer", "resume", "fsdp" and "adapters": runs of train.py on the embedded reviews, with model=tiny. They need its packages."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_stages.rows import Row, Sizes, Skip, attempted, judged, largest, missing, skipped

NEEDED = ("hydra", "omegaconf", "datasets", "pydantic")  # by train.py
COMMON = "exp_name=gpu_check model=tiny wandb.enabled=false minimum_log_interval_secs=0 warmup_steps=0 eval_batch_size=16".split()
COMMON += "do_first_eval=false eval_every=100000 n_eval_examples=8".split()
LN_2 = math.log(2)
MIXED = "model.fsdp_policy_mp=bfloat16"
DETERMINISTIC = "deterministic=true"


class Runs:
    """Runs of train.py in one folder.

    Args:
        folder: where runs are written.
        sizes: number of examples and of those in a batch.

    Raises:
        Skip: a package is missing.
    """

    def __init__(self, folder: str, sizes: Sizes):
        if reason := missing(*NEEDED):
            raise Skip(reason)
        self.folder, self.sizes = Path(folder), sizes

    def run(self, name: str, *overrides: str, samples: bool = False) -> Path:
        """Make a run, and return its folder. Later overrides win."""
        import hydra  # imported here, because these packages may be missing
        from hydra.core.global_hydra import GlobalHydra

        import train
        from tdpo.utils import CONFIG_DIR

        size = [f"batch_size={self.sizes.batch}", f"n_examples={self.sizes.examples}", f"sample_during_eval={str(samples).lower()}"]
        size += [f"datasets.reviews.n_train={self.sizes.examples}", "datasets.reviews.n_test=8"]  # few: they are drawn in every run
        given = {each.partition("=")[0]: each for each in [*COMMON, *size, f"local_dirs=[{self.folder}/cache]", *overrides]}
        given.setdefault("resume", f"local_run_dir={self.folder}/{name}")
        (self.folder / "cache").mkdir(exist_ok=True)
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(CONFIG_DIR, version_base=None):
            config = hydra.compose("config", list(given.values()))
        return Path(train.run(config, list(given.values())))

    def few(self, batches: int) -> str:
        """Return the override for a number of batches."""
        return f"n_examples={batches * self.sizes.batch}"


def losses_of(run: Path) -> list[float]:
    """Return the losses of a run's steps."""
    logs = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [log["loss/train"] for log in logs if log["split"] == "train"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights with which a run has ended."""
    return torch.load(run / "LATEST" / "policy.pt", weights_only=True, map_location="cpu")["state"]


def furthest(one: Path, other: Path) -> float:
    """Return the largest difference of a weight of two runs."""
    expected = weights_of(other)
    return largest((value.double() - expected[name].double()).abs().max().item() for name, value in weights_of(one).items())


def in_folder(stage: Callable[[Runs, Sizes, torch.device], Iterator[Row]]) -> Callable[[Sizes, torch.device], Iterator[Row]]:
    """Give a stage its runs, in a folder that is removed at its end."""

    def with_runs(sizes: Sizes, device: torch.device) -> Iterator[Row]:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            yield from stage(Runs(folder, sizes), sizes, device)

    return with_runs


@in_folder
def stage(runs: Runs, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """SFT, then TDPO2 from it in bfloat16 with samples; with a cached reference; with other optimizers."""
    sft = runs.run("sft", "loss=sft")
    losses = losses_of(sft)
    yield judged("SFT: the loss falls", losses[-1] < 0.9 * losses[0], f"{losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")
    start = ["loss=tdpo2", f"model.archive={sft}/LATEST/policy.pt"]

    def preference() -> Iterator[Row]:
        run = runs.run("tdpo2", *start, MIXED, "n_eval_model_samples=2", samples=True)
        losses = losses_of(run)
        yield judged("TDPO2, bfloat16: starts at ln 2", abs(losses[0] - LN_2) < 1e-6, f"{losses[0]:.8f}")
        yield judged("TDPO2, bfloat16: the loss falls", losses[-1] < losses[0], f"{losses[0]:.4f} to {losses[-1]:.4f}")
        samples = (run / "samples.jsonl").read_text().splitlines()
        yield judged("samples of policy and reference", "policy" in samples[0] and "reference" in samples[0], f"{len(samples)} lines")

    def cached() -> Iterator[Row]:
        direct, kept = (losses_of(runs.folder / "tdpo2"), losses_of(runs.run("cached", *start, MIXED, runs.few(3), "reference_cache=true")))
        apart = largest(abs(a - b) for a, b in zip(direct, kept))
        yield judged("a cached reference gives the same losses", apart < 1e-3, f"{apart:.1e} nats in {len(kept)} steps")

    def other(name: str) -> Iterator[Row]:
        losses = losses_of(runs.run(name, *start, runs.few(3), f"optimizer={name}", "lr=1e-3"))
        yield judged(f"{name}: the loss falls", losses[-1] < losses[0], f"{losses[0]:.4f} to {losses[-1]:.4f}")

    yield from attempted("TDPO2", preference)
    yield from attempted("reference_cache", cached)
    for name in sizes.optimizers:
        yield from attempted(f"optimizer {name}", partial(other, name))


@in_folder
def resume_stage(runs: Runs, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """With deterministic=true: two equal runs, and one that is stopped and resumed, have the same weights, bit for bit."""
    options = ["loss=tdpo2", MIXED, DETERMINISTIC]
    first, second = (runs.run(name, *options, runs.few(sizes.resumed)) for name in ("first", "second"))
    half = runs.run("half", *options, runs.few(sizes.resumed // 2))
    resumed = runs.run("half", *options, runs.few(sizes.resumed), f"resume={half}")
    expected = weights_of(first)
    for name, run in (("a second run", second), ("a resumed run", resumed)):
        different = [key for key, value in weights_of(run).items() if not torch.equal(value, expected[key])]
        yield judged(f"{name} has the same weights", not different, f"{len(different)} of {len(expected)} tensors differ")


@in_folder
def fsdp_stage(runs: Runs, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """FSDPTrainer with one rank gives the weights of BasicTrainer: over NCCL on a GPU, over gloo on a CPU."""
    for name in sizes.dtypes:

        def rows(name: str = name) -> Iterator[Row]:
            # SGD, because others also take large steps where a gradient is nothing but rounding.
            options = ["loss=tdpo2", runs.few(3), "optimizer=SGD", "lr=0.1", f"model.fsdp_policy_mp={name}"]
            basic = runs.run(f"basic-{name}", *options)
            sharded = runs.run(f"fsdp-{name}", *options, "trainer=FSDPTrainer", "nproc_per_node=1")
            weights = furthest(sharded, basic)
            losses = largest(abs(a - b) for a, b in zip(losses_of(sharded), losses_of(basic), strict=True))
            detail = f"weights {weights:.1e}, losses {losses:.1e} apart"
            yield judged(f"FSDPTrainer as BasicTrainer, {name}", largest([weights, losses]) < 1e-4, detail)
            start = losses_of(sharded)[0]
            yield judged(f"FSDPTrainer starts at ln 2, {name}", abs(start - LN_2) < 1e-6, f"{start:.8f}")

        yield from attempted(f"FSDPTrainer, {name}", rows)


@in_folder
def adapters_stage(runs: Runs, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """LoRA, and LoRA over NF4 weights, for two steps: they start at ln 2, because adapters start as nothing."""
    kinds = {"LoRA": (("peft", "accelerate"), []), "NF4": (("peft", "accelerate", "bitsandbytes"), ["model.quantize=nf4"])}
    for name, (packages, more) in kinds.items():

        def rows(name: str = name, more: tuple[str, ...] = tuple(more)) -> Iterator[Row]:
            losses = losses_of(runs.run(name, "loss=tdpo2", "adapter.rank=4", "lr=5e-3", MIXED, runs.few(2), *more))
            yield judged(f"{name} starts at ln 2", abs(losses[0] - LN_2) < 1e-6, f"{losses[0]:.8f}")
            yield judged(f"{name} trains", math.isfinite(losses[1]) and losses[1] != losses[0], f"{losses[1]:.6f} after a step")

        if reason := missing(*packages):
            yield skipped(name, reason)
        else:
            yield from attempted(name, rows)
