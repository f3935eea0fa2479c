"""Check the GPU path in one command: kernels, scoring, training, speed and memory. It runs unattended and prints its report as Markdown.

    python benchmarks/gpu.py                                 # all stages, in about nine minutes
    python benchmarks/gpu.py --only checks                   # in two commands, if that is not enough for all: what must hold,
    python benchmarks/gpu.py --only speed                    # and what is measured
    python benchmarks/gpu.py --only attention,head --out runs/attention
    python benchmarks/gpu.py --device cpu --small            # the same code on a CPU, in half a minute

It needs PyTorch and Transformers; a stage that needs more is skipped, with the names of what is missing. Models are drawn at random from
their configs, so that nothing is downloaded. Each stage runs in a process of its own with a time limit, because a failed kernel ends a
process's use of the GPU. The folder (--out) gets gpu.jsonl, a line as soon as it is known; gpu.json and gpu.md at the end, also
if SIGINT or SIGTERM ends it earlier; and each stage's output. The exit code is 1 if a stage failed, 2 for a wrong argument.
"""

import argparse
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, Optional

STARTED = time.monotonic()  # before the imports that take seconds
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look for GPUs must not start CUDA in this process, which is forked

import torch  # noqa: E402

from benchmarks.gpu_stages import attention, environment, head, reads, scorers, speed, training, updates  # noqa: E402
from benchmarks.gpu_stages.report import Outcome, Report  # noqa: E402
from benchmarks.gpu_stages.rows import FAILED, OK, SKIPPED, Measurement, Row, Sizes, Skip, last_line, prepare  # noqa: E402
from tdpo.gpu import allocate_in_segments  # noqa: E402

FORK = multiprocessing.get_context("fork")  # stages share the imports of this process, which take longer than some of them
NEOX, TRAIN, PEFT = "transformers.models.gpt_neox.modeling_gpt_neox", "train", "peft"
CHECKS, SPEED = "checks", "speed"  # groups of stages
WAIT = 0.1  # seconds between two looks whether a stage's process lives


class Stage(NamedTuple):
    """A part of the check.

    Args:
        name: by which --only chooses it.
        rows: yields its rows.
        limit: seconds after which it has failed.
        imports: modules that it shares with other stages; some may be missing.
        group: by which --only chooses it, too.
    """

    name: str
    rows: Callable[[Sizes, torch.device], Iterator[Row]]
    limit: float
    imports: tuple[str, ...] = ()
    group: str = CHECKS


# First what can make the rest worthless, then what users run, then numbers.
STAGES = [
    Stage("environment", environment.stage, 60),
    Stage("attention", attention.stage, 150),
    Stage("flex", attention.flex_stage, 200),
    Stage("head", head.stage, 120),
    Stage("scorers", scorers.stage, 180, (NEOX,)),
    Stage("compile", scorers.compile_stage, 200, (NEOX,)),
    Stage("optimizers", updates.stage, 60),
    Stage("trainer", training.stage, 120, (NEOX, TRAIN)),
    Stage("resume", training.resume_stage, 90, (NEOX, TRAIN)),
    Stage("fsdp", training.fsdp_stage, 90, (NEOX, TRAIN)),
    Stage("adapters", training.adapters_stage, 120, (NEOX, TRAIN, PEFT)),
    Stage("reads", reads.stage, 60, (NEOX, TRAIN)),
    Stage("ceilings", speed.ceilings_stage, 60, group=SPEED),
    Stage("step", speed.step_stage, 300, (NEOX,), SPEED),
    Stage("head speed", speed.head_stage, 120, group=SPEED),
    Stage("ways", speed.ways_stage, 120, (NEOX,), SPEED),
    Stage("lora", speed.lora_stage, 120, (PEFT,), SPEED),
    Stage("blocks", speed.blocks_stage, 150, group=SPEED),
]


class Ended(NamedTuple):
    """The last message of a stage's process."""

    state: str
    detail: str


def main(argv: Optional[Sequence[str]] = None, stages: Sequence[Stage] = STAGES, started: Optional[float] = None) -> int:
    """Run the chosen stages and print the report, also if SIGINT or SIGTERM interrupts them.

    Args:
        argv: arguments of the command line; None: those of this process.
        stages: all that there are.
        started: time (time.monotonic) from which --minutes count; None: now.

    Returns:
        the exit code: 0, or 1 if a stage failed.

    Raises:
        SystemExit: code 2, an argument is wrong; 128 and the number of the signal that has interrupted it.
    """
    started = time.monotonic() if started is None else started
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the report; by default a new one in runs/")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="by default cuda if there is a GPU")
    parser.add_argument("--small", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--only", type=partial(chosen, stages), default=stages, help=names_of(stages))
    parser.add_argument("--minutes", type=positive, default=9.0, help="of everything; stages that then are left are skipped")
    parser.add_argument("--timeout", type=positive, help="seconds of each stage, in place of its own limit")
    arguments = parser.parse_args(argv)
    try:
        facts = asked(environment.machine, arguments.device or "cuda")
    except multiprocessing.TimeoutError:
        parser.error("the GPU does not answer; try --device cpu")
    if arguments.device == "cuda" and not facts["has_cuda"]:
        parser.error("argument --device: PyTorch finds no GPU here; use cpu")
    device = arguments.device or ("cuda" if facts["has_cuda"] else "cpu")
    out = arguments.out or ROOT / "runs" / f"gpu-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        report = Report(out, {**facts, "device": device, "small": arguments.small, "date": f"{datetime.now():%Y-%m-%d %H:%M}"})
    except OSError as error:
        parser.error(f"argument --out: '{out}' cannot be written: {error.strerror}")
    import_shared(arguments.only, device)
    if torch.cuda.is_initialized():
        parser.error("an import has started CUDA in this process, whose stages then cannot use it; choose others with --only")
    sizes, end = Sizes.small() if arguments.small else Sizes(), started + 60 * arguments.minutes
    with ended_by_signals():
        try:
            for stage in arguments.only:
                outcome = run(stage, sizes, device, arguments.timeout or stage.limit, end, report)
                report.end(outcome)
                print(f"{outcome.stage}: {outcome.state}, {outcome.seconds:.1f} s {outcome.detail}", file=sys.stderr, flush=True)
        finally:
            for stage in arguments.only[len(report.outcomes) :]:
                report.end(Outcome(stage.name, SKIPPED, "interrupted", 0.0))
            print(report.finish(), flush=True)
    return 1 if report.failed else 0


def import_shared(stages: Sequence[Stage], device: str) -> None:
    """Import what stages share, once, in this process."""
    modules = {module for stage in stages for module in stage.imports}
    modules |= {"torch._dynamo"} if device == "cuda" else set()  # see rows.prepare
    for module in modules:
        with suppress(ImportError):
            if module == PEFT and device == "cuda":
                continue  # it imports bitsandbytes, which starts CUDA
            importlib.import_module(module)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM raises SystemExit; later ones are ignored."""
    numbers = signal.SIGINT, signal.SIGTERM

    def end(number: int, _) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def names_of(stages: Sequence[Stage]) -> str:
    """Return the help of --only."""
    groups = dict.fromkeys(stage.group for stage in stages)
    lists = (f"{group} ({', '.join(stage.name for stage in stages if stage.group == group)})" for group in groups)
    return f"names of stages or of their groups, separated by commas: {'; '.join(lists)}"


def chosen(stages: Sequence[Stage], names: str) -> list[Stage]:
    """Return the stages of a list of names, of stages or groups, in their own order."""
    wanted = [name.strip() for name in names.split(",")]
    known = [stage.name for stage in stages]
    groups = dict.fromkeys(stage.group for stage in stages)
    for name in wanted:
        if name not in known and name not in groups:
            text = f"there is no stage '{name}'; there are {', '.join(known)}, and the groups {', '.join(groups)}"
            raise argparse.ArgumentTypeError(text)
    return [stage for stage in stages if {stage.name, stage.group} & set(wanted)]


def positive(text: str) -> float:
    """Return a number above 0."""
    with suppress(ValueError):
        if (value := float(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")


def asked(function: Callable, *arguments):
    """Return what a function returns in a process of its own."""
    with FORK.Pool(1) as pool:
        return pool.apply_async(function, arguments).get(timeout=60)


def run(stage: Stage, sizes: Sizes, device: str, limit: float, end: float, report: Report) -> Outcome:
    """Run a stage in a process, add its rows to the report as they come, and end its process with all that it has started.

    Args:
        stage, sizes, device: what to run, and where.
        limit: seconds of the stage.
        end: time (time.monotonic) at which all stages end.
        report: gets the rows.
    """
    started = time.monotonic()
    if started >= end:
        return Outcome(stage.name, SKIPPED, "time", 0.0)
    here, there = FORK.Pipe(duplex=False)
    log = report.folder / f"{stage.name.replace(' ', '-')}.log"
    process = FORK.Process(target=work, args=(stage, sizes, device, limit, there, log))
    process.start()
    there.close()
    try:
        ended = received(process, here, min(started + limit, end), lambda row: report.add(stage.name, row))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # also if it has not yet made its group
        process.join()
    seconds = time.monotonic() - started
    if ended is None and started + limit > end:
        return Outcome(stage.name, SKIPPED, "time: it was ended when --minutes were over", seconds)
    ended = ended or Ended(FAILED, f"it did not end within {limit:g} s")
    return Outcome(stage.name, *judgement(ended, report, stage.name), seconds)


def judgement(ended: Ended, report: Report, name: str) -> Ended:
    """Return the state of a stage: that with which it ended, unless a check failed, or none could be made."""
    checks = report.checks_of(name)
    failed = [check for check in checks if check.state == FAILED]
    if ended.state == OK and failed:
        return Ended(FAILED, f"{len(failed)} of {len(checks)} checks: {failed[0].name}: {failed[0].detail}"[:300])
    measured = any(stage == name and isinstance(row, Measurement) for stage, row in report.rows)
    if ended.state == OK and checks and not measured and all(check.state == SKIPPED for check in checks):
        return Ended(SKIPPED, "; ".join(dict.fromkeys(check.detail for check in checks)))
    return ended


def received(process: multiprocessing.Process, pipe: Connection, end: float, add: Callable[[Row], None]) -> Optional[Ended]:
    """Pass on the rows of a stage until it has ended, and return how; None if it has not by then."""
    while time.monotonic() < end:
        alive = process.is_alive()  # before the pipe is looked at, so that its last message is not missed
        try:
            if pipe.poll(WAIT if alive else 0):
                message = pipe.recv()
                if isinstance(message, Ended):
                    return message
                add(message)
                continue
        except (EOFError, OSError):  # closed, or a message that was cut
            process.join(WAIT)
            alive = process.is_alive()
        if not alive:
            return Ended(FAILED, died(process.exitcode))
    return None


def died(code: int) -> str:
    """Return how a process without a last message has ended."""
    return f"it died by {signal.Signals(-code).name}" if code < 0 else f"it exited with code {code} before its end"


def work(stage: Stage, sizes: Sizes, device: str, limit: float, pipe: Connection, log: Path) -> None:
    """Run a stage in this process, which is its own, and send its rows. What it prints goes to the log, and where it is near its limit."""
    os.setsid()  # with what it starts it is one group, which can be killed
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not those of the process that writes the report
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # train.py takes a GPU if it sees one
    sys.stdout = sys.stderr = file = open(log, "w", buffering=1)  # noqa: SIM115 (open as long as the process)
    for stream in (1, 2):
        os.dup2(file.fileno(), stream)
    gc.freeze()  # what is imported need not be searched by each collection
    faulthandler.enable(file)
    faulthandler.dump_traceback_later(max(0.5, limit - 2), file=file)  # where it hangs
    if sizes.is_small:
        torch.set_num_threads(1)  # for small tensors more threads cost more than they save
    try:
        if device == "cuda" and torch.cuda._is_in_bad_fork():
            raise RuntimeError("CUDA was started before this process was forked, so that it cannot be used; see --only")
        allocate_in_segments()
        prepare(torch.device(device))
        for row in stage.rows(sizes, torch.device(device)):
            pipe.send(row)
        ended = Ended(OK, "")
    except Skip as reason:
        ended = Ended(SKIPPED, str(reason))
    except BaseException as error:  # a stage may fail in any way
        traceback.print_exc()
        ended = Ended(FAILED, last_line(error))
    file.flush()
    pipe.send(ended)


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
