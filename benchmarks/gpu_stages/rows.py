"""What stages yield: checks and measurements; how large their cases are; and the helpers that they share."""

import gc
import importlib.util
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import torch

from tdpo.gpu import prepare_gpu

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
NEEDS_CUDA = "needs CUDA"
GRAPHS = 64  # compiled forms of one function that are allowed, as for every shape and mode of policy and reference


class Check(NamedTuple):
    """The outcome of one comparison."""

    name: str
    state: str  # ok, failed or skipped
    detail: str  # numbers that were compared, or the reason


class Measurement(NamedTuple):
    """One line of a table of measurements."""

    table: str
    values: dict[str, Any]  # by column


Row = Union[Check, Measurement]


class Skip(Exception):
    """A stage cannot run on this machine; the message is the reason."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cases of all stages. The defaults are for one GPU of 80 GB or more, see `small`."""

    is_small: bool = False
    lengths: tuple[int, ...] = (63, 64, 192, 320, 697, 704)  # T of attention; 64, 192, 320 and 704 are 64 modulo 128
    head_sizes: tuple[int, ...] = (64, 80, 128)
    flex_lengths: tuple[int, ...] = (64, 320, 697)  # few, because FlexAttention is compiled
    flex_head_sizes: tuple[int, ...] = (64, 128)  # powers of two, for which alone the project takes it
    heads: tuple[int, int] = (8, 2)  # of queries, of keys and values
    vocabularies: tuple[int, ...] = (31, 50_257, 50_304)
    hidden: int = 256
    responses: tuple[tuple[int, int], ...] = ((1_200, 1_100), (300, 17), (1, 40))  # tokens; the first row needs several chunks
    families: tuple[str, ...] = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen3", "gemma2")
    examples: int = 640  # of a training run
    batch: int = 16
    resumed: int = 4  # batches of a run that is resumed after half of them
    optimizers: tuple[str, ...] = ("AdamW", "Adagrad")
    shapes: int = 5  # of the batches of compiled blocks
    product: int = 8_192  # rows and columns of a large matrix product
    copied: int = 2**30  # bytes
    head_vocabularies: tuple[int, ...] = (50_304, 128_256)
    head_hidden: int = 4_096
    positions: int = 8_192
    chunks: tuple[int, ...] = (2_048, 8_192)
    pairs: int = 64
    few: int = 16  # pairs of the slow ways, in four microbatches
    microbatches: tuple[int, ...] = (32, 16, 8)  # pairs; the last but one is that of the variants
    rounds: int = 3
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    layers: tuple[int, int] = (2, 4)  # of the models whose difference is the time of a layer

    @classmethod
    def small(cls) -> "Sizes":
        """Return sizes for a CPU, with which all stages together take half a minute."""
        return cls(
            is_small=True,
            lengths=(63, 64, 70),
            head_sizes=(16, 20),
            flex_lengths=(63, 64, 70),
            flex_head_sizes=(16,),
            heads=(2, 1),
            vocabularies=(31, 257, 264),
            hidden=16,
            responses=((330, 290), (20, 7), (1, 9)),
            families=("gpt_neox", "mistral"),
            examples=32,
            batch=8,
            resumed=2,
            optimizers=(),
            shapes=1,
            product=256,
            copied=2**20,
            head_vocabularies=(512,),
            head_hidden=32,
            positions=512,
            chunks=(256, 512),
            pairs=2,
            few=2,
            microbatches=(2, 1),
            rounds=1,
            dtypes=("float32",),
            layers=(1, 2),
        )


def judged(name: str, good: bool, detail: str = "") -> Check:
    """Return a check that is ok if `good`, else failed."""
    return Check(name, OK if good else FAILED, detail)


def skipped(name: str, reason: str = NEEDS_CUDA) -> Check:
    """Return a check that could not be made."""
    return Check(name, SKIPPED, reason)


def distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of `expected`, both taken to the CPU in float64; NaN if one of them is not finite."""
    value, expected = (x.detach().to("cpu", torch.float64) for x in (value, expected))
    if not (value.isfinite().all() and expected.isfinite().all()):
        return float("nan")
    return ((value - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def largest(values: Iterable[float]) -> float:
    """Return the largest number; NaN if one of them is NaN, which max() may drop."""
    return max(values, key=lambda value: (value != value, value))


class Worst:
    """The largest of several distances, with where it was found."""

    def __init__(self):
        self.value, self.where, self.count = 0.0, "", 0

    def add(self, value: float, where: str) -> None:
        self.count += 1
        if not value <= self.value:  # also if it is NaN, which then stays
            self.value, self.where = value, where

    def check(self, name: str, tolerance: float) -> Check:
        """Return a check that all distances are at most `tolerance`."""
        where = f" at {self.where}" if self.where else ""
        return judged(name, self.value <= tolerance, f"{self.value:.1e}{where}; at most {tolerance:.0e}, {self.count} values")


def last_line(error: BaseException) -> str:
    """Return the last line of an error's traceback: its type and the first line of its message."""
    return " ".join(traceback.format_exception_only(error)[-1].strip().splitlines()[:1])[:300]


def attempted(name: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Yield the rows of a part of a stage. If it raises, yield a failed check, so that the parts after it still run."""
    try:
        yield from rows()
        return
    except Exception as error:  # a part may fail in any way
        traceback.print_exc()
        failed = Check(name, FAILED, last_line(error))
        forget(error)
    gc.collect()
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a GPU that a kernel has left unusable
            torch.cuda.empty_cache()
    yield failed


def unjudged(table: str, column: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Turn failed checks into measurements: what the project does not use, cuDNN's attention, may fail.

    Args:
        table, column: of the measurements, for the name of the check.
        rows: checks and measurements.
    """
    for row in rows:
        is_failed = isinstance(row, Check) and row.state == FAILED
        yield Measurement(table, {column: row.name, "error": row.detail}) if is_failed else row


def forget(error: BaseException) -> None:
    """Clear the tracebacks of an error and of those from which it came: their frames hold the tensors of the part that failed."""
    left, seen = [error], set()
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            left += [each.__context__, each.__cause__]


def missing(*packages: str) -> Optional[str]:
    """Return "needs a, b" with those of the packages that are not installed; None if all are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(absent)}" if absent else None


def prepare(device: torch.device) -> None:
    """Compute as the project does on GPUs, but without TF32 until a stage turns it on, because most compare with float64."""
    prepare_gpu()
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda":
        limit_graphs()


def limit_graphs() -> None:
    """Let torch.compile compile a function up to GRAPHS times, then raise an error, where it would otherwise run uncompiled."""
    import torch._dynamo  # imported here, because that takes seconds

    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
