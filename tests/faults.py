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

import plot  # noqa: E402
from tdpo.checkpointing import checkpoints  # noqa: E402
from tdpo.checkpointing.checkpoints import list_checkpoints  # noqa: E402
from tdpo.distributed.signals import STOP_SIGNALS  # noqa: E402
from tdpo.distributed.world import World  # noqa: E402
from tdpo.utils import UserError  # noqa: E402

PATIENCE = 180.0  # seconds after which a process counts as hanging
GRACE = 30.0  # seconds that the other ranks get when one has failed; before they have met, they would wait for it for minutes
LOSSES = {
    "sft": ["loss=sft"],
    "tdpo2": ["loss=tdpo2"],
    "cached": ["loss=tdpo2", "reference_cache=true"],
    "sampled": ["loss=tdpo2"],
    "kto": ["loss=kto", "datasets.hh.unpair=true"],
}
TRAINERS = {
    "BasicTrainer": (1, []),
    "FSDPTrainer": (2, ["trainer=FSDPTrainer"]),
    "TensorParallelTrainer": (2, ["trainer=TensorParallelTrainer"]),
}


class BrokenPromiseError(Exception):
    """What was observed, and the output of the last process."""


@dataclass
class Slice:
    """One run and what is done to it."""

    seed: int
    folder: Path
    trainer: str = ""
    loss: str = ""
    keep: Optional[int] = None
    done: list[str] = field(default_factory=list)  # the injections so far, in words
    damaged: set[str] = field(default_factory=set)  # names of checkpoints that were damaged
    refusals: list[str] = field(default_factory=list)  # patterns of the errors with which the next start may refuse
    logs_damaged: bool = False
    outputs: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.trainer = self.random.choices(list(TRAINERS), [8, 4, 1])[0]
        self.loss = self.random.choices(list(LOSSES), [3, 3, 2, 1, 1])[0]
        self.keep = self.random.choice([None, 1, 2])
        self.run, self.cache, self.data, self.archive = (self.folder / name for name in ("run", "cache", "data", "archive"))
        shutil.copytree(MINI / "data", self.data)
        self.archive.mkdir()

    @property
    def user_cache(self) -> Path:
        return self.cache / getpass.getuser()

    def options(self, straight: Optional[Path] = None) -> list[str]:
        """Return the command line; that of an undisturbed run into the folder `straight`, if given."""
        archive = [] if self.loss == "sft" else [f"model.archive={self.archive}/step-8/policy.pt"]
        numbers = [*DATA, *LOSSES[self.loss], f"datasets.hh.path={self.data}", "n_epochs=null", "n_examples=80", "save_every=16"]
        numbers += ["eval_every=48", "n_eval_examples=8", *TRAINERS[self.trainer][1], *QUIET, *archive]
        numbers += ["sample_during_eval=true", "n_eval_model_samples=1"] * (self.loss == "sampled")
        if straight is not None:
            return [*numbers, f"local_dirs=[{self.cache}-straight]", f"local_run_dir={straight}"]
        kept = [f"keep_checkpoints={'null' if self.keep is None else self.keep}"]
        return [*numbers, *kept, f"local_dirs=[{self.cache}]", f"local_run_dir={self.run}", "resume=auto"]

    def start(self, options: list[str], limit: int = 0) -> list[Command]:
        """Start the run's processes; `limit` is the largest size of a file that they may write, in bytes; 0: none."""
        script, arguments = str(TESTS / "workers" / "constrained.py"), [str(limit), *options]
        n, _ = TRAINERS[self.trainer]
        return [Command(script, *arguments)] if n == 1 else start_supervised(script, arguments, n)


# --- processes ---


def wait(commands: list[Command], condition: Callable[[], bool] = lambda: False, seconds: float = PATIENCE) -> bool:
    """Wait until all processes have ended or the condition holds; return whether it holds.

    When one has failed, the others get GRACE seconds to notice, and are killed then, as by a launcher.
    """
    end, failed_at = time.monotonic() + seconds, None
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
    raise BrokenPromiseError(f"a process was still there after {seconds:.0f} seconds")


def finish(some: Slice, commands: list[Command], allowed: set[int]) -> int:
    """Wait for the end, check output and exit codes, and return the highest code."""
    wait(commands)
    outputs = [command.communicate()[0] for command in commands]
    some.outputs.append("\n".join(outputs))
    for text in outputs:
        if "Traceback" in text:
            raise BrokenPromiseError("a traceback")
    codes = {command.returncode for command in commands}
    if len(codes) > 1 and codes != {0}:
        codes.discard(-signal.SIGKILL)  # by `wait`
    if "" in outputs and allowed & {128 + signum for signum in STOP_SIGNALS}:
        codes.discard(1)  # the signal came while Python started
    if not codes <= allowed:
        errors = [line for text in outputs for line in text.splitlines() if line.startswith("error: ")]
        if codes & {1, 2} and codes <= {1, 2, *allowed} and any(re.search(x, line) for x in some.refusals for line in errors):
            return max(codes)
        raise BrokenPromiseError(f"exit codes {codes}, expected {allowed}: {errors or 'no error line'}")
    return max(codes, default=0)


def moment(some: Slice) -> Callable[[], bool]:
    """Return a condition that holds at a random moment of the run: while it starts, trains, or writes a checkpoint."""
    kind = some.random.choice(["time", "steps", "saving"])
    end = time.monotonic() + some.random.uniform(0.05, 3.0)
    if kind == "time":
        return lambda: time.monotonic() > end
    log, steps = some.run / "metrics.jsonl", some.random.randint(1, 6)
    before = log.stat().st_size if log.exists() else 0
    if kind == "steps":
        return lambda: log.exists() and log.stat().st_size > before + 250 * steps
    return lambda: any(some.run.glob("step-*.tmp")) if some.run.exists() else False


# --- injections while the run is up ---


def kill(some: Slice, commands: list[Command]) -> set[int]:
    """SIGKILL to all processes at once."""
    for command in commands:
        command.kill()
    return {-signal.SIGKILL, 0}


def kill_one_rank(some: Slice, commands: list[Command]) -> set[int]:
    """SIGKILL to one rank; the others notice. A single process is killed."""
    some.random.choice(commands).kill()
    return {-signal.SIGKILL, 0, 1}


def stop(some: Slice, commands: list[Command]) -> set[int]:
    """A stop signal to one process or all; before training has begun it ends a process at once."""
    signum = some.random.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    told = commands if some.random.random() < 0.5 else [some.random.choice(commands)]
    for command in told:
        if command.poll() is None:
            command.send_signal(signum)
    return {128 + signum, -signum, 0, 1} if len(commands) > 1 else {128 + signum, -signum, 0}


def interrupt_twice(some: Slice, commands: list[Command]) -> set[int]:
    """Ctrl-C, and again a moment later."""
    for _ in range(2):
        for command in commands:
            if command.poll() is None:
                command.send_signal(signal.SIGINT)
        time.sleep(some.random.uniform(0.0, 0.1))
    return {130, -signal.SIGINT, 0, 1} if len(commands) > 1 else {130, -signal.SIGINT, 0}


def race(some: Slice, commands: list[Command]) -> set[int]:
    """The same command, started while the run is up: it waits, and then finds the run finished or goes on with it."""
    second = some.start(some.options())
    finish(some, second, {0, 2})
    some.refusals.append("another run writes into")
    return {0}


def freeze(some: Slice, commands: list[Command]) -> set[int]:
    """All processes are stopped for a second, as by a suspended machine."""
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for command in commands:
            if command.poll() is None:
                command.send_signal(signum)
        time.sleep(some.random.uniform(0.2, 1.0))
    return {0}


UP = {kill: 8, kill_one_rank: 1, stop: 3, interrupt_twice: 1, race: 1, freeze: 1}


def starve(some: Slice) -> None:
    """Start with a limit on the size of files, which stands in for a full disk: the run fails in a line, or never meets the limit."""
    limit = int(2 ** some.random.uniform(7, 19))
    some.done.append(f"file size limit {limit:,}")
    some.refusals += ["could not be written", "cannot be written", "File too large"]
    finish(some, some.start(some.options(), limit), {0, 1, 2})


# --- injections while the run is down ---


def flip(file: Path, some: Slice) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[some.random.randrange(len(content))] ^= 1 << some.random.randrange(8)
        file.write_bytes(content)


SPOILS = ("flipped bit", "cut", "emptied", "removed", "zeroed page", "foreign bytes", "folder in its place", "appended")


def spoil(file: Path, some: Slice) -> str:
    """Damage a file in one of several ways; return which."""
    kind = some.random.choice(SPOILS)
    size = file.stat().st_size
    if kind == "flipped bit":
        flip(file, some)
    elif kind == "cut":
        os.truncate(file, some.random.randrange(max(1, size)))
    elif kind == "emptied":
        os.truncate(file, 0)
    elif kind == "zeroed page":
        content = bytearray(file.read_bytes())
        start = some.random.randrange(max(1, size))
        content[start : start + 512] = bytes(len(content[start : start + 512]))
        changed = bytes(content) != file.read_bytes()
        file.write_bytes(content)
        if not changed:
            os.truncate(file, 0)
    elif kind == "foreign bytes":
        file.write_bytes(some.random.randbytes(some.random.randrange(1, 200)))
    elif kind == "appended":
        with open(file, "ab") as handle:
            handle.write(b"\xff\x00{}\n")
    else:
        file.unlink()
        if kind == "folder in its place":
            file.mkdir()
    return kind


def damage_checkpoint(some: Slice) -> Optional[str]:
    """Damage a file of a checkpoint, which is then skipped."""
    folders = list_checkpoints(str(some.run))
    if not folders:
        return None
    folder = Path(folders[0] if some.random.random() < 0.7 else some.random.choice(folders))
    files = [path for path in folder.rglob("*") if path.is_file() and "hf" not in path.relative_to(folder).parts]
    file = some.random.choice(sorted(files))
    some.damaged.add(folder.name)
    return f"{file.relative_to(some.run)}: {spoil(file, some)}"


FOREIGN = (b"\xff\xfe\n", b"null\n", b"{}\n", b"[" * 5000 + b"\n", b'{"split": "tra', b'{"counters/examples": "x"}\n')


def damage_logs(some: Slice) -> Optional[str]:
    """Damage metrics.jsonl or samples.jsonl: lines of others, bytes that are no text, or anything."""
    file = some.random.choice([some.run / "metrics.jsonl", some.run / "samples.jsonl"])
    if not file.is_file():
        return None
    if some.random.random() < 0.6:
        foreign = some.random.choice(FOREIGN)
        with open(file, "ab") as handle:
            handle.write(foreign)
        return f"{file.name}: {foreign[:20]!r} appended"
    some.logs_damaged = True
    said = spoil(file, some)
    if file.is_dir():
        some.refusals.append(rf"{file.name}.* cannot be (read|written)")
    return f"{file.name}: {said}"


NAMES = ("LATEST.tmp", "step-48.tmp", "step-²", "step-99999", "step-64.tmp", "config.yaml.tmp", "metrics.jsonl.tmp", "LATEST")


def damage_links(some: Slice) -> Optional[str]:
    """Put things in the way: names of temporary files, folders that look like checkpoints, a LATEST that leads nowhere."""
    if not some.run.is_dir():
        return None
    name = some.random.choice(NAMES)
    path = some.run / name
    if os.path.lexists(path):
        if path.is_dir() and not path.is_symlink():
            return None
        path.unlink()
    kind = "link" if name == "LATEST" else some.random.choice(["file", "folder", "link"])
    if kind == "folder":
        path.mkdir()
        (path / "x").touch()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"x")
    return f"{name}: a {kind}"


def damage_caches(some: Slice) -> Optional[str]:
    """Damage a file of the token cache or the reference cache, which is then made again."""
    files = sorted(path for path in some.user_cache.rglob("*") if path.is_file()) if some.user_cache.is_dir() else []
    if not files:
        return None
    file = some.random.choice(files)
    return f"cache {file.name[:20]}: {spoil(file, some)}"


def damage_config(some: Slice) -> Optional[str]:
    """Damage the run's config.yaml, which resuming does not read."""
    file = some.run / "config.yaml"
    if not file.is_file():
        return None
    said = spoil(file, some)
    if file.is_dir():
        some.refusals.append("local_run_dir=.* cannot be written")
    return f"config.yaml: {said}"


def damage_inputs(some: Slice) -> Optional[str]:
    """Damage the archive or the data: the run refuses, in a line, and goes on once they are as before."""
    if some.loss == "sft" or some.random.random() < 0.4:
        file, refusal = (
            some.data / "train.jsonl.gz",
            "train.jsonl.gz|hh train|the train data|data path|no rows|has no split",
        )
    else:
        file, refusal = some.archive / "step-8" / "policy.pt", "model.archive="
    whole = file.read_bytes()
    said = f"{file.name}: {spoil(file, some)}"
    some.refusals.append(refusal)
    commands = some.start(some.options())
    code = finish(some, commands, {0, 2})
    unread = "appended" in said or "flipped" in said or "zeroed" in said  # a gzip's header or padding may change without its content
    if code == 0 and not (file.suffix == ".gz" and unread):
        raise BrokenPromiseError(f"{said}, and the run went on")
    some.refusals.remove(refusal)
    if file.is_dir():
        file.rmdir()
    file.write_bytes(whole)
    return said


DOWN = {damage_checkpoint: 5, damage_logs: 2, damage_links: 3, damage_caches: 2, damage_config: 1, damage_inputs: 1}


# --- a slice ---


class Straight(NamedTuple):
    """Results of an undisturbed run."""

    weights: dict[str, torch.Tensor]
    losses: list[dict]


def make_archive(folder: Path) -> None:
    """Write an SFT checkpoint whose policy is the recorded one, with its hash beside it."""
    state = torch.load(ARCHIVE.partition("=")[2], weights_only=True)["state"]
    checkpoints.save_checkpoint(World(), str(folder), state, {"policy": state}, {"examples": 8, "eval_metrics": {}})


def undisturbed(some: Slice, known: dict[tuple[str, str], Straight]) -> Straight:
    key = some.trainer, some.loss
    if key not in known:
        folder = some.folder / "straight"
        finish(some, some.start(some.options(folder)), {0})
        known[key] = Straight(weights_of(folder), losses_of(folder))
    return known[key]


def sound(some: Slice) -> set[str]:
    """Return the names of the run's checkpoints that were not damaged."""
    return {Path(folder).name for folder in list_checkpoints(str(some.run))} - some.damaged


def check_folder(some: Slice, before: set[str]) -> None:
    """Check that no sound checkpoint was set aside or, without keep_checkpoints, removed."""
    names = {path.name for path in some.run.iterdir()} if some.run.is_dir() else set()
    aside = {name.partition(".old")[0] for name in names if re.fullmatch(r"step-[0-9]+\.old(\.[0-9]+)?", name)}
    if aside - some.damaged - {"step-99999", "step-48", "step-64"}:
        raise BrokenPromiseError(f"sound checkpoints were set aside: {aside - some.damaged}")
    if some.keep is None and not before <= names:
        raise BrokenPromiseError(f"sound checkpoints are gone: {before - names}")
    if before and not sound(some):
        raise BrokenPromiseError("no sound checkpoint is left")


def run_slice(some: Slice, known: dict[tuple[str, str], Straight], counts: Counter) -> None:
    make_archive(some.archive)
    straight = undisturbed(some, known)
    for _ in range(some.random.randint(2, 5)):
        before = sound(some)
        for _ in range(some.random.choice([0, 1, 2, 4, 6, 8])):
            inject = some.random.choices(list(DOWN), DOWN.values())[0]
            if said := inject(some):
                some.done.append(said)
                counts[inject.__name__] += 1
        before -= some.damaged
        if some.random.random() < 0.1:
            counts["starve"] += 1
            starve(some)
            check_folder(some, before)
            unblock(some)
            continue
        commands = some.start(some.options())
        allowed = {0}
        if wait(commands, moment(some)):
            inject = some.random.choices(list(UP), UP.values())[0]
            some.done.append(inject.__name__)
            counts[inject.__name__ + (" FSDP" if some.trainer == "FSDPTrainer" else "")] += 1
            allowed = inject(some, commands)
        finish(some, commands, allowed)
        check_folder(some, before)
        unblock(some)
    before = sound(some)
    finish(some, some.start(some.options()), {0})
    check_folder(some, before)
    if some.damaged & {Path(folder).name for folder in list_checkpoints(str(some.run))}:
        some.damaged = {name for name in some.damaged if (some.run / name).exists()}
    check_result(some, straight)


def unblock(some: Slice) -> None:
    """Remove folders that stand in the place of logs or config, which a run refuses."""
    for name in ("metrics.jsonl", "samples.jsonl", "config.yaml"):
        if (some.run / name).is_dir():
            (some.run / name).rmdir()
    some.refusals.clear()


def check_result(some: Slice, straight: Straight) -> None:
    weights = weights_of(some.run)
    wrong = [name for name, tensor in straight.weights.items() if not torch.equal(weights[name], tensor)]
    if wrong:
        raise BrokenPromiseError(f"other weights than those of an undisturbed run: {wrong[:3]}")
    if not some.logs_damaged and losses_of(some.run) != straight.losses:
        raise BrokenPromiseError("other logs than those of an undisturbed run")
    try:
        plot.read_run(str(some.run))
    except UserError:
        if not some.logs_damaged:
            raise
    left = [path.name for path in some.run.iterdir() if path.name.endswith(".tmp") and path.name.startswith("step-")]
    left += [path.name for path in some.user_cache.glob("tokens/new-*")] + [path.name for path in some.user_cache.glob("reference/*.new")]
    if left:
        raise BrokenPromiseError(f"left behind: {left}")


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
        if time.monotonic() > end:
            break
        some = Slice(seed, Path(tempfile.mkdtemp(prefix="tdpo-faults-", dir=place)))
        began = time.monotonic()
        try:
            run_slice(some, known, counts)
        except Exception as error:
            print("\n".join([some.outputs[-1][-3000:] if some.outputs else "", *some.done]))
            print(f"seed {seed}: {some.trainer}, {some.loss}, keep_checkpoints={some.keep}: {type(error).__name__}: {error}")
            print(f"to repeat: python tests/faults.py --seed {seed} --slices 1 --keep")
            if arguments.keep:
                sys.exit(f"kept: {some.folder}")
            shutil.rmtree(some.folder, ignore_errors=True)
            sys.exit(1)
        shutil.rmtree(some.folder, ignore_errors=True)
        took = time.monotonic() - began
        print(f"seed {seed}: {some.trainer}, {some.loss}, {took:.0f} s: {', '.join(some.done) or 'undisturbed'}", flush=True)
    print(f"{sum(counts.values())} injections, all promises kept: {json.dumps(counts)}")


if __name__ == "__main__":
    main()
