"""Reproduce the paper's figure 3: expected reward against KL(pi || pi_ref), and SeqKL of chosen and rejected, for DPO, TDPO1 and TDPO2.

    python experiments/frontier/run.py                                   embedded reviews, on CPU cores
    python experiments/frontier/run.py --task imdb --out runs/imdb       the paper's size, on GPUs
    python experiments/frontier/run.py --task path/to/own.yaml           another task

For each seed: SFT, then completions by the SFT model, which the reward ranks into pairs; with sft: null, completions by a model that is
given. Every method is trained over the same grid, and the checkpoints of every run are measured. The same command resumes after an
interruption and retries what failed. A task is a file <task>.yaml in this folder, or the path of one; reviews.yaml explains the keys.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from experiments.jobs import Step, run_jobs, slug  # noqa: E402
from experiments.scripts import run_script  # noqa: E402
from tdpo.cli.command_line import override  # noqa: E402
from tdpo.utils import UserError  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Reward against KL for DPO, TDPO1 and TDPO2.")
    parser.add_argument("--task", default="reviews", help="name of a file <task>.yaml in this folder, or its path (default: %(default)s)")
    parser.add_argument("--out", default=None, help="folder for the runs and results (default: runs/frontier-<task>)")
    parser.add_argument("--workers", type=int, default=None, help="number of jobs at the same time (default: the task's)")
    parser.add_argument(
        "--methods", type=lambda names: names.split(","), help="some of the task's methods, for example 'DPO,TDPO2 0.5' (default: all)"
    )
    parser.add_argument("overrides", nargs="*", help="keys of the task's file, for example seeds=[0,1,2,3]")
    arguments = parser.parse_args()
    try:
        task = load_task(arguments.task, arguments.overrides, arguments.methods)
    except UserError as error:
        sys.exit(f"error: {error}")
    out = Path(arguments.out or f"runs/frontier-{Path(arguments.task).stem}").resolve()
    workers = arguments.workers or task.workers or torch.cuda.device_count() or len(os.sched_getaffinity(0))
    (out / "logs").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(task, out / "task.yaml")
    began = time.monotonic()
    folders = data_folders(task)
    prepared = [preparation(task, out, seed) for seed in folders.values()]
    title = "Completions, pairs" if task.sft is None else "SFT, completions, pairs"
    failed = run_jobs(title, prepared, workers, out, [f"{folder}/pairs/test.jsonl" for folder in folders], len(folders))
    if failed:
        log = (out / "logs" / f"{failed[0]}.log").read_text().splitlines()
        sys.exit("\n".join([*log[-3:], f"error: {', '.join(failed)} failed, see '{out}/logs'"]))
    swept = [[train_step(task, out, name), measure_step(task, out, name)] for name in task.methods]
    marks = [f"{slug(name)}/*/{mark}" for name in task.methods for mark in ("LATEST/hf", "measured.json")]

    def done() -> float:
        """Return the number of runs, of which a trained one that is not measured counts half."""
        return sum(len(list(out.glob(mark))) for mark in marks) / 2

    runs = len(task.methods) * len(task.seeds) * len(task.betas) * len(task.lrs)
    failed = run_jobs("Runs, trained and measured", swept, workers, out, done, runs)
    reported = run_script("experiments/frontier/report.py", str(out))
    if not reported:
        print(f"{(time.monotonic() - began) / 60:.1f} minutes; results in '{out}'")
    if failed:
        tail = f"see '{out}/logs': {', '.join(failed)}; run the same command again to retry"
        sys.exit(f"error: {len(failed)} steps failed, {tail}")


def load_task(name: str, overrides: Sequence[str], methods: Optional[Sequence[str]]) -> DictConfig:
    """Load a task, with overrides, the methods that are to be run, and absolute paths.

    Args:
        name: of a file in this folder, or a path.
        overrides: <key>=<value> each.
        methods: some of the task's methods; None: all.

    Raises:
        UserError: there is no such file, key, method or prompt file, or the reference or its prompts are missing.
    """
    known = {path.stem: path for path in sorted(HERE.glob("*.yaml"))}
    file = known.get(name, Path(name))
    if not file.is_file():
        raise UserError(f"--task {name}: no such task or file; the tasks are {', '.join(known)}")
    task = OmegaConf.load(file)
    given = OmegaConf.from_dotlist(list(overrides))
    if missing := sorted(set(OmegaConf.load(known["reviews"])) - set(task)):
        raise UserError(f"'{file}' lacks the keys {', '.join(missing)}: copy them from '{known['reviews']}', which explains them")
    if unknown := sorted(set(given) - set(task)):
        raise UserError(f"unknown key {', '.join(unknown)}: the keys of {file.name} are {', '.join(task)}")
    task = OmegaConf.merge(task, given)
    if unknown := sorted(set(methods or ()) - set(task.methods)):
        raise UserError(f"unknown --methods {', '.join(unknown)}: the methods of {name} are {', '.join(task.methods)}")
    task.methods = {method: command for method, command in task.methods.items() if method in (methods or task.methods)}
    if task.sft is None and None in (task.model, task.prompts, task.reward):
        raise UserError(f"'{file}' has sft: null, so it needs a model, prompts and a reward")
    if task.sft is not None and task.share_completions:
        raise UserError(f"'{file}' has share_completions: true, but every seed has its own SFT model: set it to false, or sft to null")
    for key in ("train", "test") if task.prompts else ():
        task.prompts[key] = str(ROOT / task.prompts[key])
        if not Path(task.prompts[key]).is_file():
            raise UserError(f"prompts.{key}={task.prompts[key]} does not exist")
    if task.model is not None and (ROOT / task.model).is_dir():
        task.model = str(ROOT / task.model)
    return task


def data_folders(task: DictConfig) -> dict[str, int]:
    """Return folder -> seed of each set of completions and pairs: one per seed, or one for all."""
    seeds = list(task.seeds)[:1] if task.share_completions else task.seeds
    return {f"seed{seed}": seed for seed in seeds}


def preparation(task: DictConfig, out: Path, seed: int) -> list[Step]:
    """Return the steps that prepare a seed: SFT, if there is one, completions of the train and test prompts, pairs."""
    folder, steps = out / f"seed{seed}", []
    if task.sft is not None:
        where = [f"local_run_dir={folder}/sft", "resume=auto"]
        steps.append(Step(f"seed{seed}_sft", ["train.py", *task.common, *task.sft, "loss=sft", "exp_name=sft", f"seed={seed}", *where]))
    for split in ("train", "test"):
        prompts = task.completion_prompts if split == "train" else None
        sizes = [f"n={task.completions}", f"n_prompts={'null' if prompts is None else prompts}", f"batch_size={task.completion_batch_size}"]
        sizes += [] if task.max_new_tokens is None else [f"max_new_tokens={task.max_new_tokens}"]
        source = [f"split={split}"] + ([] if task.prompts is None else [override("prompts", task.prompts[split])])
        where = [*([f"run={folder}/sft"] if task.sft is not None else [override("run", task.model), *lengths_of(task)]), *source]
        where.append(f"out={folder}/completions-{split}.jsonl")
        steps.append(Step(f"seed{seed}_completions_{split}", ["sample.py", *where, *sizes, f"seed={seed}"]))
    pairs = ["experiments/frontier/pairs.py", str(folder), f"--margin={task.min_margin}", *reward_of(task)]
    pairs += [] if task.prompts is None else ["--prompts", task.prompts.train, task.prompts.test]
    pairs += [f"--model={task.model}"] if task.sft is None else [f"--model={folder}/sft"]
    return [*steps, Step(f"seed{seed}_pairs", pairs)]


def lengths_of(task: DictConfig) -> list[str]:
    """Return the maximum lengths of training as overrides of sample.py, which knows those of runs alone."""
    return [given for given in task.common if given.startswith(("max_length=", "max_prompt_length="))]


def reward_of(task: DictConfig) -> list[str]:
    """Return the --reward argument of pairs.py and measure.py; empty for the gold reward of the data."""
    return [] if task.reward is None else [f"--reward={task.reward}"]


def train_step(task: DictConfig, out: Path, name: str) -> Step:
    """Return the step that trains all runs of a method as a Hydra sweep (--multirun): if one run fails, the others continue."""
    base = f"{out}/seed{task.seeds[0]}" if task.share_completions else f"{out}/seed${{seed}}"
    data = ["datasets=[jsonl]", f"datasets.jsonl.path='{base}/pairs/train.jsonl'", f"datasets.jsonl.eval_path='{base}/pairs/test.jsonl'"]
    grid = [f"seed={','.join(map(str, task.seeds))}", f"loss.beta={','.join(map(str, task.betas))}", f"lr={','.join(map(str, task.lrs))}"]
    folder = f"local_run_dir='{out}/{slug(name)}/beta${{loss.beta}}_lr${{lr}}_seed${{seed}}'"
    common = [override for override in task.common if not override.startswith("datasets")]
    length = ["n_epochs=null", f"n_examples={task.examples}", f"save_every={task.examples // task.checkpoints}"]
    start = override("model.name_or_path", task.model) if task.sft is None else f"model.archive='{base}/sft/LATEST/policy.pt'"
    rest = [*common, *data, *task.preference, *length, start, *task.methods[name].split()]
    return Step(f"{slug(name)}_train", ["train.py", "--multirun", *rest, *grid, folder, "resume=auto", "exp_name=frontier"])


def measure_step(task: DictConfig, out: Path, name: str) -> Step:
    """Return the step that measures all runs of a method."""
    sizes = [f"--n_prompts={task.n_prompts}", f"--n={task.n}", f"--batch_size={task.batch_size}"]
    sizes += [] if task.max_new_tokens is None else [f"--max_new_tokens={task.max_new_tokens}"]
    sizes += [] if task.prompts is None else [f"--prompts={task.prompts.test}"]
    command = ["experiments/frontier/measure.py", str(out / slug(name)), *sizes, *reward_of(task)]
    return Step(f"{slug(name)}_measure", command)


if __name__ == "__main__":
    main()
