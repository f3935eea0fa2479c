"""Injects faults into runs at random, and checks what a run promises: python tests/faults.py --seconds 600 --seed 7

Slice after slice, each with its own seed: a run is started, killed, stopped, raced and starved of disk space at random moments, its files
are damaged while it is down, and it is resumed with the same command until it has ended. Then three promises are checked:

1. The weights are those of an undisturbed run, bit for bit; so are the logs, unless they themselves were damaged.
2. A run refuses to go on only where what it refuses was damaged, in a line; nothing sound is set aside or removed.
3. There is no traceback.

The first broken promise ends the program with exit code 1 and the command that repeats its slice. Not part of `make test`.
"""

import argparse
import getpass
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Optional

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "workers")]

import torch  # noqa: E402
from helpers import ARCHIVE, DATA, MINI, QUIET, Command, losses_of, start_supervised, weights_of  # noqa: E402
from injections import DOWN, UP, BrokenPromiseError, moment, starve  # noqa: E402

import plot  # noqa: E402
from tdpo.checkpointing.checkpoints import damaged_files, list_checkpoints, save_checkpoint  # noqa: E402
from tdpo.distributed.signals import STOP_SIGNALS  # noqa: E402
from tdpo.distributed.world import World  # noqa: E402
from tdpo.utils import UserError  # noqa: E402

PATIENCE = 180.0  # seconds after which a process counts as hanging
GRACE = 30.0  # seconds that the other ranks get when one has failed; before they have met, they would wait for it for minutes
LOSSES = {
    "sft": ["loss=sft"],
    "tdpo2": ["loss=tdpo2"],
    "cached": ["loss=tdpo2", "reference_cache=true"],
    "sampled": ["loss=tdpo2", "sample_during_eval=true", "n_eval_model_samples=1"],
    "kto": ["loss=kto", "datasets.hh.unpair=true"],
    "adapters": ["loss=tdpo2", "adapter.rank=4", "reference.update_every=3", "reference.mixup=1"],
}
TRAINERS = {
    "BasicTrainer": (1, []),
    "FSDPTrainer": (2, ["trainer=FSDPTrainer"]),
    "TensorParallelTrainer": (2, ["trainer=TensorParallelTrainer"]),
}


@dataclass
class Slice:
    """One run and what is done to it."""

    seed: int
    folder: Path
    done: list[str] = field(default_factory=list)  # the injections so far, in words
    counts: Counter = field(default_factory=Counter)  # the same by kind
    refusals: list[str] = field(default_factory=list)  # patterns of the errors with which the next start may refuse
    logs_damaged: bool = False
    output: str = ""  # of the last processes

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.trainer = self.random.choices(list(TRAINERS), [8, 4, 1])[0]
        self.loss = self.random.choices(list(LOSSES), [3, 3, 2, 1, 1, 2])[0]
        if self.trainer == "TensorParallelTrainer" and self.loss == "adapters":
            self.loss = "tdpo2"  # it has no adapters
        self.keep = self.random.choice([None, 1, 2])
        self.run, self.cache, self.data, self.archive = (self.folder / name for name in ("run", "cache", "data", "archive"))
        shutil.copytree(MINI / "data", self.data)
        state = torch.load(ARCHIVE.partition("=")[2], weights_only=True)["state"]
        self.archive.mkdir()  # an SFT checkpoint whose policy is the recorded one, with its hash beside it
        save_checkpoint(World(), str(self.archive), state, {"policy": state}, {"examples": 8, "eval_metrics": {}})

    @property
    def user_cache(self) -> Path:
        return self.cache / getpass.getuser()

    def options(self, straight: Optional[Path] = None) -> list[str]:
        """Return the command line; that of an undisturbed run into the folder `straight`, if given."""
        archive = [] if self.loss == "sft" else [f"model.archive={self.archive}/step-8/policy.pt"]
        numbers = [*DATA, *QUIET, *LOSSES[self.loss], *TRAINERS[self.trainer][1], *archive, f"datasets.hh.path={self.data}"]
        numbers += ["n_epochs=null", "n_examples=80", "save_every=16", "eval_every=48", "n_eval_examples=8"]
        if straight is not None:
            return [*numbers, f"local_dirs=[{self.cache}-straight]", f"local_run_dir={straight}"]
        kept = f"keep_checkpoints={'null' if self.keep is None else self.keep}"
        return [*numbers, kept, f"local_dirs=[{self.cache}]", f"local_run_dir={self.run}", "resume=auto"]

    def start(self, options: Optional[list[str]] = None, limit: int = 0) -> list[Command]:
        """Start the run's processes.

        Args:
            options: the command line; None: the run's own.
            limit: largest size of a file that they may write, in bytes; 0: none.
        """
        script = str(TESTS / "workers" / "constrained.py")
        arguments = [str(limit), *(self.options() if options is None else options)]
        n, _ = TRAINERS[self.trainer]
        return [Command(script, *arguments)] if n == 1 else start_supervised(script, arguments, n)

    def finish(self, commands: list[Command], allowed: set[int]) -> int:
        """Wait for the end, check output and exit codes, and return the highest code.

        Args:
            commands: the processes of one start.
            allowed: exit codes; beside these, 1 and 2 if an error has a pattern of `refusals`.
        """
        wait(commands)
        outputs = [command.communicate()[0] for command in commands]
        self.output = "\n".join(outputs)
        if "Traceback" in self.output:
            raise BrokenPromiseError("a traceback")
        codes = {command.returncode for command in commands}
        if len(codes) > 1 and codes != {0}:
            codes.discard(-signal.SIGKILL)  # by `wait`
        if "" in outputs and allowed & {128 + signum for signum in STOP_SIGNALS}:
            codes.discard(1)  # the signal came while Python started
        errors = [line for line in self.output.splitlines() if line.startswith("error: ")]
        refused = codes <= {1, 2, *allowed} and any(re.search(x, line) for x in self.refusals for line in errors)
        if not (codes <= allowed or refused):
            raise BrokenPromiseError(f"exit codes {codes}, expected {allowed}: {errors or 'no error line'}")
        return max(codes, default=0)


def wait(commands: list[Command], condition: Callable[[], bool] = lambda: False) -> bool:
    """Wait until all processes have ended or the condition holds; return whether it holds.

    When one has failed, the others get GRACE seconds to notice, and are killed then, as by a launcher.
    """
    end, failed_at = time.monotonic() + PATIENCE, None
    while time.monotonic() < end:
        if condition():
            return True
        codes = [command.poll() for command in commands]
        if None not in codes:
            return False
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + GRACE:
            for command in commands:
                command.kill()
        time.sleep(0.01)
    for command in commands:
        command.kill()
    raise BrokenPromiseError(f"a process was still there after {PATIENCE:.0f} seconds")


class Straight(NamedTuple):
    """Results of an undisturbed run."""

    weights: dict[str, torch.Tensor]
    losses: list[dict]


def undisturbed(some: Slice, known: dict[tuple[str, str], Straight]) -> Straight:
    """Return the results of the slice's run without faults, made once for each trainer and loss."""
    key = some.trainer, some.loss
    if key not in known:
        folder = some.folder / "straight"
        some.finish(some.start(some.options(folder)), {0})
        known[key] = Straight(weights_of(folder), losses_of(folder))
    return known[key]


def is_sound(folder: Path) -> bool:
    return not damaged_files(World(), str(folder))


def sound(some: Slice) -> set[str]:
    """Return the names of the run's undamaged checkpoints."""
    return {Path(folder).name for folder in list_checkpoints(str(some.run)) if is_sound(Path(folder))}


def check_folder(some: Slice, before: set[str]) -> None:
    """Check that no sound checkpoint was set aside or, without keep_checkpoints, removed. `before` are those before the last start."""
    aside = [path for path in some.run.glob("step-*.old*") if re.fullmatch(r"step-[0-9]+\.old(\.[0-9]+)?", path.name)]
    if found := [path.name for path in aside if is_sound(path)]:
        raise BrokenPromiseError(f"sound checkpoints were set aside: {found}")
    now = sound(some)
    if some.keep is None and not before <= now:
        raise BrokenPromiseError(f"sound checkpoints are gone: {before - now}")
    if before and not now:
        raise BrokenPromiseError("no sound checkpoint is left")


def run_slice(some: Slice, known: dict[tuple[str, str], Straight]) -> None:
    """Damage, start and disturb the run several times; then let it end, and check the result."""
    straight = undisturbed(some, known)
    for _ in range(some.random.randint(2, 5)):
        for _ in range(some.random.choice([0, 1, 2, 4, 6, 8])):
            inject = some.random.choices(list(DOWN), DOWN.values())[0]
            if said := inject(some):
                some.done.append(said)
                some.counts[inject.__name__] += 1
        before = sound(some)
        if some.random.random() < 0.1:
            starve(some)
        else:
            disturb(some)
        check_folder(some, before)
        unblock(some)
    before = sound(some)
    some.finish(some.start(), {0})
    check_folder(some, before)
    check_result(some, straight)


def disturb(some: Slice) -> None:
    """Start the run, and do something to its processes at a random moment."""
    commands, allowed = some.start(), {0}
    if wait(commands, moment(some)):
        inject = some.random.choices(list(UP), UP.values())[0]
        some.done.append(inject.__name__)
        some.counts[f"{inject.__name__} {some.trainer}"] += 1
        allowed = inject(some, commands)
    some.finish(commands, allowed)


def unblock(some: Slice) -> None:
    """Remove folders that stand in the place of logs or config, which a run refuses."""
    for name in ("metrics.jsonl", "samples.jsonl", "config.yaml"):
        if (some.run / name).is_dir():
            (some.run / name).rmdir()
    some.refusals.clear()


def check_result(some: Slice, straight: Straight) -> None:
    """Compare the finished run with an undisturbed one, and look for what was left behind."""
    weights = weights_of(some.run)
    if wrong := [name for name, tensor in straight.weights.items() if not torch.equal(weights[name], tensor)]:
        raise BrokenPromiseError(f"other weights than those of an undisturbed run: {wrong[:3]}")
    if not some.logs_damaged and losses_of(some.run) != straight.losses:
        raise BrokenPromiseError("other logs than those of an undisturbed run")
    try:
        plot.read_run(str(some.run))
    except UserError:
        if not some.logs_damaged:
            raise
    left = [*some.run.glob("step-*.tmp"), *some.user_cache.glob("tokens/new-*"), *some.user_cache.glob("reference/*.new")]
    if left:
        raise BrokenPromiseError(f"left behind: {[path.name for path in left]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Inject faults into runs at random and check what they promise.")
    parser.add_argument("--seconds", type=float, default=600, help="no slice begins later than this (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first slice; the next ones count up (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=10**9, help="largest number of slices (default: as many as fit)")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a slice with a broken promise")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end, known, counts = time.monotonic() + arguments.seconds, {}, Counter()
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for seed in range(arguments.seed, arguments.seed + arguments.slices):
        began = time.monotonic()
        if began > end:
            break
        some = Slice(seed, Path(tempfile.mkdtemp(prefix="tdpo-faults-", dir=place)))
        what = f"seed {seed}: {some.trainer}, {some.loss}, keep_checkpoints={some.keep}"
        try:
            run_slice(some, known)
        except Exception as error:
            print("\n".join([some.output[-3000:], *some.done, f"{what}: {type(error).__name__}: {error}"]))
            print(f"to repeat: python tests/faults.py --seed {seed} --slices 1 --keep")
            if not arguments.keep:
                shutil.rmtree(some.folder, ignore_errors=True)
            sys.exit(f"kept: {some.folder}" if arguments.keep else 1)
        shutil.rmtree(some.folder, ignore_errors=True)
        counts += some.counts
        print(f"{what}, {time.monotonic() - began:.0f} s: {', '.join(some.done) or 'undisturbed'}", flush=True)
    print(f"{sum(counts.values())} injections, all promises kept: {json.dumps(counts)}")


if __name__ == "__main__":
    main()
