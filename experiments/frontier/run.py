"""The paper's figure 3 again: expected reward against KL(pi || pi_ref), SeqKL on chosen and rejected responses, for DPO, TDPO1 and TDPO2.

    python experiments/frontier/run.py                                   embedded reviews, on CPU cores
    python experiments/frontier/run.py --task imdb --out runs/imdb       the paper's size, on GPUs

SFT; completions by the SFT model, ranked by the reward, are the pairs; every method over the same grid; every run measured along the way.
The same command goes on where it was interrupted, or tries again what failed. A task is a file <task>.yaml beside this one.
"""

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import tqdm
from omegaconf import DictConfig, OmegaConf

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Reward against KL for DPO, TDPO1 and TDPO2.")
    parser.add_argument("--task", default="reviews", choices=sorted(path.stem for path in HERE.glob("*.yaml")))
    parser.add_argument("--out", default=None, help="folder of the runs and results (default: runs/frontier-<task>)")
    parser.add_argument("--workers", type=int, default=None, help="runs at the same time (default: GPUs, or else CPU cores)")
    parser.add_argument("--methods", nargs="+", default=None, help="some of the task's methods (default: all)")
    parser.add_argument("overrides", nargs="*", help="keys of the task's file: seeds=[0,1,2,3]")
    arguments = parser.parse_args()
    task = OmegaConf.load(HERE / f"{arguments.task}.yaml")
    given = OmegaConf.from_dotlist(arguments.overrides)
    if unknown := sorted(set(given) - set(task)):
        sys.exit(f"error: unknown key {', '.join(unknown)}: {arguments.task}.yaml has {', '.join(task)}")
    task = OmegaConf.merge(task, given)
    if unknown := sorted(set(arguments.methods or ()) - set(task.methods)):
        sys.exit(f"error: --methods {', '.join(unknown)}: {arguments.task} has {', '.join(task.methods)}")
    task.methods = {name: command for name, command in task.methods.items() if name in (arguments.methods or task.methods)}
    out = Path(arguments.out or f"runs/frontier-{arguments.task}").resolve()
    workers = arguments.workers or torch.cuda.device_count() or len(os.sched_getaffinity(0))
    (out / "logs").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(task, out / "task.yaml")
    began = time.monotonic()
    prepare(task, out)
    failed = sweep(task, out, workers)
    reported = subprocess.run([sys.executable, HERE / "report.py", out]).returncode
    if not reported:
        print(f"{(time.monotonic() - began) / 60:.1f} minutes; results in {out}")
    if failed:
        tail = f"see {out}/logs: {', '.join(failed)}; the same command tries again"
        sys.exit(f"error: {len(failed)} of the sweep's parts did not end well, {tail}")


def prepare(task: DictConfig, out: Path) -> None:
    """SFT, completions of the train prompts, and pairs of them."""
    sft = [*task.common, *task.sft, "loss=sft", "exp_name=sft", f"local_run_dir={out}/sft", "resume=auto"]
    call("SFT", out, "train.py", *sft)
    for split in ("train", "test"):
        samples = str(out / f"completions-{split}.jsonl")
        call(
            f"completions {split}",
            out,
            "sample.py",
            f"run={out}/sft",
            f"split={split}",
            f"n={task.completions}",
            "batch_size=256",
            f"out={samples}",
        )
    call("pairs", out, "experiments/frontier/pairs.py", str(out), f"--margin={task.min_margin}", *reward_of(task))


def reward_of(task: DictConfig) -> list[str]:
    return [] if task.reward is None else [f"--reward={task.reward}"]


def sweep(task: DictConfig, out: Path, workers: int) -> list[str]:
    """Train every method over the grid and measure its runs; the names of those that did not end well.

    A method is a sweep of Hydra's (--multirun), and then one process that measures; `workers` of them at a time, on a share of the cores or
    a GPU each.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for name in task.methods:
        waiting.put(name)
    failed = []

    def work(worker: int) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[worker % len(visible)]
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            for what, command in (("train", train_command(task, out, name)), ("measure", measure_command(task, out, name))):
                if quietly(f"{name} {what}", out, command, environment):
                    failed.append(f"{name} {what}")

    # Daemons: they end with this process, as their children do, where it is interrupted.
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    total = len(task.methods) * len(task.seeds) * len(task.betas) * len(task.lrs)
    with tqdm.tqdm(total=2 * total, desc="Training and measuring", unit=" runs", disable=None) as progress:
        while any(thread.is_alive() for thread in threads):
            time.sleep(1)
            progress.update(len(list(out.glob("*/*/LATEST/hf"))) + len(list(out.glob("*/*/measured.json"))) - progress.n)
    return failed


def train_command(task: DictConfig, out: Path, name: str) -> list[str]:
    pairs = ["datasets=[jsonl]", f"datasets.jsonl.path={out}/pairs/train.jsonl", f"datasets.jsonl.eval_path={out}/pairs/test.jsonl"]
    examples = len((out / "pairs" / "train.jsonl").read_text().splitlines())
    grid = [f"seed={','.join(map(str, task.seeds))}", f"loss.beta={','.join(map(str, task.betas))}", f"lr={','.join(map(str, task.lrs))}"]
    folder = f"local_run_dir='{out}/{slug(name)}/beta${{loss.beta}}_lr${{lr}}_seed${{seed}}'"
    common = [override for override in task.common if not override.startswith("datasets")]
    every = max(1, examples * epochs_of(task) // task.checkpoints)
    archive = f"model.archive={out}/sft/LATEST/policy.pt"
    rest = [*common, *pairs, *task.preference, f"save_every={every}", archive, *task.methods[name].split()]
    return [str(ROOT / "train.py"), "--multirun", *rest, *grid, folder, "resume=auto", "exp_name=frontier"]


def epochs_of(task: DictConfig) -> int:
    return next((int(override.split("=")[1]) for override in task.preference if override.startswith("n_epochs=")), 1)


def measure_command(task: DictConfig, out: Path, name: str) -> list[str]:
    sizes = [f"--n_prompts={task.n_prompts}", f"--n={task.n}", f"--batch_size={task.batch_size}"]
    return [
        str(HERE / "measure.py"),
        str(out / slug(name)),
        f"--pairs={out}/pairs/test.jsonl",
        f"--prompts_of={out}/sft",
        *sizes,
        *reward_of(task),
    ]


def slug(name: str) -> str:
    return name.lower().replace(" ", "_")


def call(what: str, out: Path, script: str, *arguments: str) -> None:
    """Run a script of the repository; its output goes to a log. Ends the program where that fails."""
    print(f"{what} ...", flush=True)
    if quietly(what, out, [str(ROOT / script), *arguments], dict(os.environ)):
        log = (out / "logs" / f"{slug(what)}.log").read_text().splitlines()
        sys.exit("\n".join([*log[-3:], f"error: {what} failed, see {out}/logs/{slug(what)}.log"]))


def quietly(what: str, out: Path, command: list[str], environment: dict[str, str]) -> int:
    with open(out / "logs" / f"{slug(what)}.log", "w") as log:
        return subprocess.run(
            [sys.executable, "-u", *command], stdout=log, stderr=log, env=environment, stdin=subprocess.DEVNULL
        ).returncode


if __name__ == "__main__":
    main()
