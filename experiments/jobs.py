"""Run the jobs of an experiment: several at a time, each a list of scripts with their output in logs/, under one progress bar."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Union

import torch
import tqdm

from experiments.scripts import run_script, send_to_scripts
from tdpo.distributed.signals import forwarded
from tdpo.training.sinks import duration

LINES = 50  # at most so many tell the progress where there is no terminal for a bar


class Step(NamedTuple):
    """One subprocess of the experiment."""

    name: str  # also the name of its log
    command: list[str]  # script and arguments
    required: bool = False  # if it fails, the steps after it in its job are left out


def slug(name: str) -> str:
    """Return a method's name as part of a path."""
    return name.lower().replace(" ", "_")


Marks = Union[Sequence[str], Callable[[], float]]


def run_jobs(title: str, jobs: Sequence[Sequence[Step]], workers: int, out: Path, marks: Marks, total: int) -> list[str]:
    """Run the jobs, `workers` at a time, each with its share of the CPU cores and of the GPUs.

    Args:
        title: label of the progress bar.
        jobs: the steps of each job, run one after another; steps after a failed one are still run, unless it is required.
        workers: number of jobs at the same time.
        out: folder of the experiment.
        marks: glob patterns in `out`, of which the number of matching files is the progress; or a function that returns the progress.
        total: the progress at the end.

    Returns:
        the names of the steps that failed.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    failed = []

    def progress() -> float:
        return marks() if callable(marks) else sum(len(list(out.glob(mark))) for mark in marks)

    def work(worker: int) -> None:
        environment = environment_of(worker, workers)
        while not received:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            for step in job:
                if received:
                    return
                if ended_badly(step, out, environment):
                    failed.append(step.name)
                    if step.required:
                        break

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(workers)]
    # Time left is that at the mean speed since this start, to which earlier starts have not contributed.
    before, began = progress(), time.monotonic()
    done = told = before
    bar = tqdm.tqdm(total=total, initial=before, desc=title, smoothing=0, disable=None)
    with forwarded(send_to_scripts) as received, bar:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.5)
            last, done = done, progress()
            bar.update(done - last)
            if bar.disable and done > told and done - told >= total / LINES:  # no terminal
                left = duration((time.monotonic() - began) * (total - done) / (done - before))
                print(f"{title}: {done:g} of {total:g}, {left} left", file=sys.stderr, flush=True)
                told = done
    if received:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(128 + received[0])
    return failed


def environment_of(worker: int, workers: int) -> dict[str, str]:
    """Return the environment of a worker: its number of CPU threads and, if there are GPUs, its share of them, at least one."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers))}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[worker % len(visible) :: workers])
    return environment


def ended_badly(step: Step, out: Path, environment: dict[str, str]) -> bool:
    """Run a step with its output in logs/<name>.log. Return whether it failed."""
    script, *arguments = step.command
    try:
        with open(out / "logs" / f"{step.name}.log", "w") as log:
            return run_script(script, *arguments, output=log, environment=environment) != 0
    except OSError as error:  # a full disk
        print(f"{step.name}: {error}", file=sys.stderr)
        return True
