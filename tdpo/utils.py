"""Small helpers: errors, logging, paths, text, seeds, and the utilities of the published code."""

import difflib
import fcntl
import getpass
import logging
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, Optional, TextIO, TypeVar, Union

import numpy as np
import torch
import torch.distributed as dist
import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the root of the clone, which holds the commands and config/
CONFIG_DIR = os.path.join(ROOT, "config")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
T = TypeVar("T")
IGNORED = -100  # label of tokens that are not in the loss, as in torch.nn.CrossEntropyLoss


class UserError(Exception):
    """Invalid input. The message gives cause and fix in one or two lines. Shown without a traceback; exit code 2."""


class RunError(Exception):
    """A failure at run time (such as NaN, out of memory or a full disk). Shown without a traceback; exit code 1."""


class PeerError(Exception):
    """Another rank failed and reports it; this rank exits quietly, with code 1."""


class Stopped(Exception):
    """A signal asked the run to stop; a running training saves its last completed step.

    Args:
        signum: the signal's number.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class ConsoleHandler(logging.Handler):
    """A handler that writes records to standard output, errors to standard error, without breaking a progress bar.

    The streams are looked up at each write, so replaced ones are respected. If `silenced` is true, as on all ranks but the first, only
    errors are shown.
    """

    silenced = False

    def emit(self, record: logging.LogRecord) -> None:
        if self.silenced and record.levelno < logging.ERROR:
            return
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        tqdm.tqdm.write(prefix + self.format(record), file=stream)
        stream.flush()


CONSOLE = ConsoleHandler()


@contextmanager
def silenced(other_rank: bool) -> Iterator[None]:
    """Log only errors within the block, if `other_rank` is true (this is not rank 0)."""
    before, CONSOLE.silenced = CONSOLE.silenced, other_rank
    try:
        yield
    finally:
        CONSOLE.silenced = before


def reason_of(error: Exception, most: int = 200) -> str:
    """Return an error's text in one line, of at most `most` characters."""
    return " ".join(str(error).split())[:most]


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module of this project. Records from INFO up are shown, also without the commands.

    logging.getLogger("tdpo").setLevel(logging.WARNING) makes all of them quiet.
    """
    root = logging.getLogger("tdpo")
    if CONSOLE not in root.handlers:
        root.addHandler(CONSOLE)
        root.setLevel(logging.INFO)
        root.propagate = False  # else a handler of the application would show the records twice
    return root if name == "tdpo" else root.getChild(name.removeprefix("tdpo."))


class Console:
    """Standard output or error that never raises: a run must not end because a terminal has closed or the disk of its log is full.

    Characters that the encoding lacks are written as backslash escapes; what cannot be written is dropped.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def lenient_console() -> Iterator[None]:
    """Use `Console` as standard output and error within the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Console, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def rank0_print(*args, **kwargs) -> None:
    """Print on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*args, **kwargs)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor on every rank.

    Args:
        tensor: any shape; returned as it is if it is not a DTensor.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # no isinstance: importing DTensor takes a second


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that contain NaN or infinity; of a sharded tensor only this rank's shard is looked at.

    Args:
        tensors: floating-point tensors of any shape by name; others count as finite.
    """
    local = {name: x.to_local() if hasattr(x, "to_local") else x for name, x in tensors.items()}
    looked_at = {name: x.detach() for name, x in local.items() if x.is_floating_point() and x.numel()}
    if not looked_at:
        return []
    # The extremes are not finite if any element is not; this reads each tensor once, and waits for the device once.
    extremes = torch.stack([torch.stack(torch.aminmax(x)).double() for x in looked_at.values()])
    return [name for name, ok in zip(looked_at, extremes.isfinite().all(1).tolist()) if not ok]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean x?)' with the known name most similar to `name`, ignoring case, or '' if none is similar."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return f" (did you mean {by_lower[matches[0]]}?)" if matches else ""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def looks_local(path: str) -> bool:
    """Return whether `path` names a local file or folder, existing or not, rather than a repository owner/name on the hub."""
    local_endings = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".pt", ".bin", ".safetensors", ".gguf")
    return path.startswith(("/", ".", "~")) or path.endswith(local_endings) or path.count("/") > 1 or os.path.exists(path)


def get_local_dir(prefixes_to_resolve: list[str]) -> str:
    """Return <prefix>/<user> for the first prefix that exists, or for the last one if none exists. Creates nothing."""
    for prefix in prefixes_to_resolve:
        if os.path.exists(prefix):
            break
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in the password file
        user = str(os.getuid())
    return os.path.join(prefix, user)


def batched(items: Sequence[T], size: int) -> list[tuple[int, Sequence[T]]]:
    """Split items into batches of `size` (the last may be smaller). Returns (index of the first item, items) for each batch."""
    return [(start, items[start : start + size]) for start in range(0, len(items), size)]


def flat_keys(values: Mapping, prefix: str = "") -> list[str]:
    """Return a key such as 'a.b.c' for every leaf of a nested mapping."""
    keys = []
    for key, value in values.items():
        keys += flat_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return keys


def pad_to_length(tensor: torch.Tensor, length: int, pad_value: Union[int, float], dim: int = -1) -> torch.Tensor:
    """Pad a tensor at the end of `dim` to `length`; a tensor of at least this length is returned as it is.

    Args:
        tensor: any shape.
        length: minimal size of `dim`.
        pad_value: value of the added entries.
        dim: the dimension to pad.
    """
    missing = length - tensor.size(dim)
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, pad_value)], dim=dim)


def get_local_run_dir(exp_name: str, local_dirs: list[str]) -> str:
    """Return the default folder of a run that starts now, <local_dir>/<user>/<exp_name>_<timestamp>. Creates nothing."""
    return os.path.join(get_local_dir(local_dirs), f"{exp_name}_{datetime.now().strftime('%Y-%m-%d_%H-%M-%S_%f')}")


def formatted_dict(values: dict) -> dict:
    """Format the floats of a mapping with five significant digits, for printing."""
    return {k: (f"{v:.5g}" if isinstance(v, float) else v) for k, v in values.items()}


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to 0: of Dropout modules, and the float attributes of layers (GPT-NeoX, Llama, Starcoder2, Bloom)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def seed_generators(seed: int) -> None:
    """Seed the random number generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def try_lock(handle: int) -> bool:
    """Lock a file or folder until this process closes it or ends. Returns False if another process holds the lock.

    On network file systems without locks this returns True for every process.

    Args:
        handle: descriptor of the open file or folder.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when it takes longer. Only the main thread can be interrupted; in others there is no limit.

    Args:
        seconds: of the wall clock.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for the device, which from the CPU to a GPU takes pinned memory."""
    pinned = tensor.device.type == "cpu" and device.type == "cuda"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


def some_of(items: list, limit: int = 12) -> str:
    """Join the first `limit` items, such as 'a, b, c and 7 more'."""
    shown = ", ".join(str(x) for x in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def as_bytes(count: int) -> str:
    """Format a number of bytes: '0.4 MB', '12.3 GB'."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def plural(count: int, noun: str, plural_noun: Optional[str] = None) -> str:
    """Format a count with its noun: '1 row', '2,000 rows'."""
    return f"{count:,} {noun if count == 1 else plural_noun or noun + 's'}"


# Helpers of the published code that this project does not use, kept for forks that call them.


def slice_and_move_batch_for_device(batch: Mapping, rank: int, world_size: int, device: str) -> dict:
    """Return a rank's slice of every value of a batch, with tensors moved to `device`. The last B % world_size rows are dropped.

    Args:
        batch: tensors of shape (B, ...) and lists of length B.
        rank: this rank.
        world_size: number of ranks, which get slices of equal size.
        device: as for Tensor.to.
    """
    size = len(next(iter(batch.values()))) // world_size
    own = slice(size * rank, size * (rank + 1))
    return {key: value[own].to(device) if isinstance(value, torch.Tensor) else value[own] for key, value in batch.items()}


def all_gather_if_needed(values: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """Concatenate the values of all ranks.

    Args:
        values: (B, ...) or a scalar; the same shape on every rank.
        rank: unused, kept for the published signature.
        world_size: number of ranks; with 1 the values are returned as they are.

    Returns:
        (world_size * B, ...), or (world_size,) for scalars, on the device of `values`.
    """
    if world_size == 1:
        return values
    gathered = [torch.empty_like(values) for _ in range(world_size)]
    dist.all_gather(gathered, values)
    return (torch.cat if values.dim() > 0 else torch.stack)(gathered)


def get_block_class_from_model(model: torch.nn.Module, block_class_name: str) -> type[torch.nn.Module]:
    """Return the class of a model's modules that has this name.

    Raises:
        ValueError: no module has a class of this name.
    """
    for module in model.modules():
        if type(module).__name__ == block_class_name:
            return type(module)
    raise ValueError(f"{type(model).__name__} has no module of class {block_class_name}")


def get_open_port() -> int:
    """Return a currently free TCP port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def print_gpu_memory(rank: Optional[int] = None, message: str = "") -> None:
    """Print the memory that PyTorch has allocated on each visible GPU, in MB; without GPUs print nothing."""
    for i in range(torch.cuda.device_count()):
        print(f"{message} rank {rank}: GPU {i}: {torch.cuda.memory_allocated(i) / 1e6:.2f} MB")


class TemporarilySeededRandom:
    """A context in which `random` and NumPy's global generator start from `seed`. Their previous states are restored at its end."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self._before = random.getstate(), np.random.get_state()
        random.seed(self.seed)
        np.random.seed(self.seed)

    def __exit__(self, *_: object) -> None:
        random.setstate(self._before[0])
        np.random.set_state(self._before[1])
