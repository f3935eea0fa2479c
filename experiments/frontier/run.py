"""Reproduce the paper's figure 3: expected reward against KL(pi || pi_ref), and SeqKL of chosen and rejected, for DPO, TDPO1 and TDPO2.

    python experiments/frontier/run.py                                   embedded reviews, on CPU cores
    python experiments/frontier/run.py --task imdb --out runs/imdb       the paper's size, on GPUs

For each seed: SFT, then completions by the SFT model, which the reward ranks into pairs. Every method is trained over the same grid, and
the checkpoints of every run are measured. The same command resumes after an interruption and retries what failed. A task is a file
<task>.yaml in this folder.
"""

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from experiments.jobs import Step, run_jobs, slug  # noqa: E402
from experiments.scripts import run_script  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Reward against KL for DPO, TDPO1 and TDPO2.")
    parser.add_argument("--task", default="reviews", choices=sorted(path.stem for path in HERE.glob("*.yaml")))
    parser.add_argument("--out", default=None, help="folder for the runs and results (default: runs/frontier-<task>)")
    parser.add_argument("--workers", type=int, default=None, help="number of jobs at the same time (default: GPUs, otherwise CPU cores)")
    parser.add_argument(
        "--methods", type=lambda names: names.split(","), help="some of the task's methods, for example 'DPO,TDPO2 0.5' (default: all)"
    )
    parser.add_argument("overrides", nargs="*", help="keys of the task's file, for example seeds=[0,1,2,3]")
    arguments = parser.parse_args()
    task = OmegaConf.load(HERE / f"{arguments.task}.yaml")
    given = OmegaConf.from_dotlist(arguments.overrides)
    if unknown := sorted(set(given) - set(task)):
        sys.exit(f"error: unknown key {', '.join(unknown)}: the keys of {arguments.task}.yaml are {', '.join(task)}")
    task = OmegaConf.merge(task, given)
    if unknown := sorted(set(arguments.methods or ()) - set(task.methods)):
        sys.exit(f"error: unknown --methods {', '.join(unknown)}: the methods of {arguments.task} are {', '.join(task.methods)}")
    task.methods = {name: command for name, command in task.methods.items() if name in (arguments.methods or task.methods)}
    out = Path(arguments.out or f"runs/frontier-{arguments.task}").resolve()
    workers = arguments.workers or torch.cuda.device_count() or len(os.sched_getaffinity(0))
    (out / "logs").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(task, out / "task.yaml")
    began = time.monotonic()
    prepared = [preparation(task, out, seed) for seed in task.seeds]
    failed = run_jobs("SFT, completions, pairs", prepared, workers, out, ["seed*/pairs/test.jsonl"], len(task.seeds))
    if failed:
        log = (out / "logs" / f"{failed[0]}.log").read_text().splitlines()
        sys.exit("\n".join([*log[-3:], f"error: {', '.join(failed)} failed, see '{out}/logs'"]))
    swept = [[train_step(task, out, name), measure_step(task, out, name)] for name in task.methods]
    runs = len(task.methods) * len(task.seeds) * len(task.betas) * len(task.lrs)
    failed = run_jobs("Training and measuring", swept, workers, out, ["*/*/LATEST/hf", "*/*/measured.json"], len(task.seeds) + 2 * runs)
    reported = run_script("experiments/frontier/report.py", str(out))
    if not reported:
        print(f"{(time.monotonic() - began) / 60:.1f} minutes; results in '{out}'")
    if failed:
        tail = f"see '{out}/logs': {', '.join(failed)}; run the same command again to retry"
        sys.exit(f"error: {len(failed)} steps failed, {tail}")


def preparation(task: DictConfig, out: Path, seed: int) -> list[Step]:
    """Return the steps that prepare a seed: SFT, completions of the train and test prompts, pairs."""
    folder = out / f"seed{seed}"
    run = f"local_run_dir={folder}/sft"
    steps = [Step(f"seed{seed}_sft", ["train.py", *task.common, *task.sft, "loss=sft", "exp_name=sft", f"seed={seed}", run, "resume=auto"])]
    for split in ("train", "test"):
        prompts = task.completion_prompts if split == "train" else None
        sizes = [f"n={task.completions}", f"n_prompts={'null' if prompts is None else prompts}", f"batch_size={task.completion_batch_size}"]
        where = [f"run={folder}/sft", f"split={split}", f"out={folder}/completions-{split}.jsonl"]
        steps.append(Step(f"seed{seed}_completions_{split}", ["sample.py", *where, *sizes, f"seed={seed}"]))
    pairs = ["experiments/frontier/pairs.py", str(folder), f"--margin={task.min_margin}", *reward_of(task)]
    return [*steps, Step(f"seed{seed}_pairs", pairs)]


def reward_of(task: DictConfig) -> list[str]:
    """Return the --reward argument of pairs.py and measure.py; empty for the gold reward of the data."""
    return [] if task.reward is None else [f"--reward={task.reward}"]


def train_step(task: DictConfig, out: Path, name: str) -> Step:
    """Return the step that trains all runs of a method as a Hydra sweep (--multirun): if one run fails, the others continue."""
    base = f"{out}/seed${{seed}}"
    data = ["datasets=[jsonl]", f"datasets.jsonl.path='{base}/pairs/train.jsonl'", f"datasets.jsonl.eval_path='{base}/pairs/test.jsonl'"]
    grid = [f"seed={','.join(map(str, task.seeds))}", f"loss.beta={','.join(map(str, task.betas))}", f"lr={','.join(map(str, task.lrs))}"]
    folder = f"local_run_dir='{out}/{slug(name)}/beta${{loss.beta}}_lr${{lr}}_seed${{seed}}'"
    common = [override for override in task.common if not override.startswith("datasets")]
    length = ["n_epochs=null", f"n_examples={task.examples}", f"save_every={task.examples // task.checkpoints}"]
    archive = f"model.archive='{base}/sft/LATEST/policy.pt'"
    rest = [*common, *data, *task.preference, *length, archive, *task.methods[name].split()]
    return Step(f"{slug(name)}_train", ["train.py", "--multirun", *rest, *grid, folder, "resume=auto", "exp_name=frontier"])


def measure_step(task: DictConfig, out: Path, name: str) -> Step:
    """Return the step that measures all runs of a method."""
    sizes = [f"--n_prompts={task.n_prompts}", f"--n={task.n}", f"--batch_size={task.batch_size}"]
    command = ["experiments/frontier/measure.py", str(out / slug(name)), *sizes, *reward_of(task)]
    return Step(f"{slug(name)}_measure", command)


if __name__ == "__main__":
    main()
