"""What tests/faults.py does to a run (a Slice): while its processes are up, and to its files while they are down."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from helpers import Command

from tdpo.checkpointing.checkpoints import list_checkpoints

if TYPE_CHECKING:
    from faults import Slice


class BrokenPromiseError(Exception):
    """What was observed."""


def moment(some: "Slice") -> Callable[[], bool]:
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


def kill(some: "Slice", commands: list[Command]) -> set[int]:
    """SIGKILL to all processes at once."""
    for command in commands:
        command.kill()
    return {-signal.SIGKILL, 0}


def kill_one_rank(some: "Slice", commands: list[Command]) -> set[int]:
    """SIGKILL to one rank; the others notice. A single process is killed."""
    some.random.choice(commands).kill()
    return {-signal.SIGKILL, 0, 1}


def stop(some: "Slice", commands: list[Command]) -> set[int]:
    """A stop signal to one process or all; before training has begun it ends a process at once."""
    signum = some.random.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    told = commands if some.random.random() < 0.5 else [some.random.choice(commands)]
    for command in told:
        if command.poll() is None:
            command.send_signal(signum)
    return {128 + signum, -signum, 0, 1} if len(commands) > 1 else {128 + signum, -signum, 0}


def interrupt_twice(some: "Slice", commands: list[Command]) -> set[int]:
    """Ctrl-C, and again a moment later."""
    for _ in range(2):
        for command in commands:
            if command.poll() is None:
                command.send_signal(signal.SIGINT)
        time.sleep(some.random.uniform(0.0, 0.1))
    return {130, -signal.SIGINT, 0, 1} if len(commands) > 1 else {130, -signal.SIGINT, 0}


def race(some: "Slice", commands: list[Command]) -> set[int]:
    """The same command, started while the run is up: it waits, and then finds the run finished, or is refused."""
    some.refusals.append("another run writes into")
    some.finish(some.start(), {0})
    return {0}


def freeze(some: "Slice", commands: list[Command]) -> set[int]:
    """All processes are stopped for a second, as by a suspended machine."""
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for command in commands:
            if command.poll() is None:
                command.send_signal(signum)
        time.sleep(some.random.uniform(0.2, 1.0))
    return {0}


UP = {kill: 8, kill_one_rank: 1, stop: 3, interrupt_twice: 1, race: 1, freeze: 1}


def starve(some: "Slice") -> None:
    """Start with a limit on the size of files, which stands in for a full disk: the run fails in a line, or never meets the limit."""
    limit = int(2 ** some.random.uniform(7, 19))
    some.done.append(f"file size limit {limit}")
    some.counts["starve"] += 1
    some.refusals += ["could not be written", "cannot be written", "File too large"]
    some.finish(some.start(limit=limit), {0})


# --- injections while the run is down ---


def flip(file: Path, some: "Slice") -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[some.random.randrange(len(content))] ^= 1 << some.random.randrange(8)
        file.write_bytes(content)


SPOILS = ("flipped bit", "cut", "emptied", "removed", "zeroed page", "foreign bytes", "folder in its place", "appended")


def spoil(file: Path, some: "Slice") -> str:
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


def damage_checkpoint(some: "Slice") -> Optional[str]:
    """Damage a file of a checkpoint, which is then skipped."""
    folders = list_checkpoints(str(some.run))
    if not folders:
        return None
    folder = Path(folders[0] if some.random.random() < 0.7 else some.random.choice(folders))
    files = [path for path in folder.rglob("*") if path.is_file() and "hf" not in path.relative_to(folder).parts]
    file = some.random.choice(sorted(files))
    return f"{file.relative_to(some.run)}: {spoil(file, some)}"


FOREIGN = (b"\xff\xfe\n", b"null\n", b"{}\n", b"[" * 5000 + b"\n", b'{"split": "tra', b'{"counters/examples": "x"}\n')


def damage_logs(some: "Slice") -> Optional[str]:
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


def damage_links(some: "Slice") -> Optional[str]:
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


def damage_caches(some: "Slice") -> Optional[str]:
    """Damage a file of the token cache or the reference cache, which is then made again."""
    files = sorted(path for path in some.user_cache.rglob("*") if path.is_file()) if some.user_cache.is_dir() else []
    if not files:
        return None
    file = some.random.choice(files)
    return f"cache {file.name[:20]}: {spoil(file, some)}"


def damage_config(some: "Slice") -> Optional[str]:
    """Damage the run's config.yaml, which resuming does not read."""
    file = some.run / "config.yaml"
    if not file.is_file():
        return None
    said = spoil(file, some)
    if file.is_dir():
        some.refusals.append("local_run_dir=.* cannot be written")
    return f"config.yaml: {said}"


def damage_inputs(some: "Slice") -> Optional[str]:
    """Damage the archive or the data: the run refuses, in a line, and goes on once they are as before."""
    if some.loss == "sft" or some.random.random() < 0.4:
        file = some.data / "train.jsonl.gz"
        refusal = "train.jsonl.gz|hh train|the train data|data path|no rows|has no split"
    else:
        file, refusal = some.archive / "step-8" / "policy.pt", "model.archive="
    whole = file.read_bytes()
    said = f"{file.name}: {spoil(file, some)}"
    some.refusals.append(refusal)
    code = some.finish(some.start(), {0})
    unread = "appended" in said or "flipped" in said or "zeroed" in said  # a gzip's header or padding may change without its content
    if code == 0 and not (file.suffix == ".gz" and unread):
        raise BrokenPromiseError(f"{said}, and the run went on")
    some.refusals.remove(refusal)
    if file.is_dir():
        file.rmdir()
    file.write_bytes(whole)
    return said


DOWN = {damage_checkpoint: 5, damage_logs: 2, damage_links: 3, damage_caches: 2, damage_config: 1, damage_inputs: 1}
