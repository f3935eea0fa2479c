"""Small helpers that need no accelerator."""

import difflib
import fcntl
import getpass
import logging
import os
import random
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Optional, TypeVar, Union

import numpy as np
import torch
import torch.distributed as dist
import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of a clone, which has the commands and config/
CONFIG_DIR = os.path.join(ROOT, "config")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
T = TypeVar("T")
IGNORED = -100  # the label of a token that is no response token, as in torch.nn.CrossEntropyLoss


class UserError(Exception):
    """A mistake that its reader can mend: one or two lines with cause and remedy, shown without a traceback; exit code 2."""


class RunError(Exception):
    """A run that cannot go on for a reason that lies in its numbers or its machine; shown without a traceback; exit code 1."""


class PeerError(Exception):
    """Another process of the run could not go on, and says why: this one ends in silence; exit code 1."""


class Stopped(Exception):
    """A signal asked the run to end; what it had done is saved. `signum` is the signal's number."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class ConsoleHandler(logging.Handler):
    """Writes records above a progress bar to standard output, errors to standard error; both are looked up at each write.

    Of several ranks, all but the first are silenced: only their errors are shown.
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
    """Within the block nothing but errors is logged, if this is not the rank that speaks for all."""
    before, CONSOLE.silenced = CONSOLE.silenced, other_rank
    try:
        yield
    finally:
        CONSOLE.silenced = before


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module of this project; what it logs from INFO on is shown, also where the library is used by itself.

    logging.getLogger("tdpo").setLevel(logging.WARNING) makes it quiet.
    """
    root = logging.getLogger("tdpo")
    if CONSOLE not in root.handlers:
        root.addHandler(CONSOLE)
        root.setLevel(logging.INFO)
        root.propagate = False  # what the application does with other records would show these twice
    return root if name == "tdpo" else root.getChild(name.removeprefix("tdpo."))


def rank0_print(*args, **kwargs) -> None:
    """Print on rank 0 alone."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*args, **kwargs)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor as a whole, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of DTensor, whose import takes a second


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean x?)' for the known name nearest to `name`, or ''. Case does not count."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return f" (did you mean {by_lower[matches[0]]}?)" if matches else ""


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def looks_local(path: str) -> bool:
    """Whether this names a local file or folder, existing or not, and no repository owner/name on the hub."""
    local_endings = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".pt", ".bin", ".safetensors")
    return path.startswith(("/", ".", "~")) or path.endswith(local_endings) or path.count("/") > 1 or os.path.exists(path)


def get_local_dir(prefixes_to_resolve: list[str]) -> str:
    """The user's folder under the first of these folders that exists; under the last one where none does. Nothing is made."""
    for prefix in prefixes_to_resolve:
        if os.path.exists(prefix):
            break
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in the password file
        user = str(os.getuid())
    return os.path.join(prefix, user)


def batched(items: Sequence[T], size: int) -> list[tuple[int, Sequence[T]]]:
    """(number of its first item, items) of each run of `size` items; the last may be shorter."""
    return [(start, items[start : start + size]) for start in range(0, len(items), size)]


def flat_keys(values: Mapping, prefix: str = "") -> list[str]:
    """'a.b.c' for every leaf of a nested mapping."""
    keys = []
    for key, value in values.items():
        keys += flat_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [f"{prefix}{key}"]
    return keys


def pad_to_length(tensor: torch.Tensor, length: int, pad_value: Union[int, float], dim: int = -1) -> torch.Tensor:
    """The tensor, padded at the end of `dim` to `length` where it is shorter."""
    missing = length - tensor.size(dim)
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, pad_value)], dim=dim)


def get_local_run_dir(exp_name: str, local_dirs: list[str]) -> str:
    """Return the default folder of a run that starts now, <local_dir>/<user>/<exp_name>_<timestamp>. Nothing is made."""
    return os.path.join(get_local_dir(local_dirs), f"{exp_name}_{datetime.now().strftime('%Y-%m-%d_%H-%M-%S_%f')}")


def formatted_dict(values: dict) -> dict:
    """Floats with five digits, for printing."""
    return {k: (f"{v:.5g}" if isinstance(v, float) else v) for k, v in values.items()}


def disable_dropout(model: torch.nn.Module) -> None:
    """Turn off every dropout: modules, and the probabilities that layers keep as plain floats (GPT-NeoX, Llama, Starcoder2, Bloom)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def try_lock(handle: int) -> bool:
    """Lock a file or folder until this process closes it or ends; False where another process has locked it.

    On a network disk that has no locks, nobody is kept away.

    Args:
        handle: of the open file or folder.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def some_of(items: list, limit: int = 12) -> str:
    """'a, b, c and 7 more'."""
    shown = ", ".join(str(x) for x in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def plural(count: int, noun: str, plural_noun: Optional[str] = None) -> str:
    """'1 row', '2 rows'; thousands are separated."""
    return f"{count:,} {noun if count == 1 else plural_noun or noun + 's'}"


# Published helpers that this project has no use for, for forks that call them.


def slice_and_move_batch_for_device(batch: Mapping, rank: int, world_size: int, device: str) -> dict:
    """Return a rank's equal slice of every value of a batch, tensors on `device`. Rows beyond a multiple of world_size are left out.

    Args:
        batch: tensors of shape (B, ...) and lists of B.
    """
    size = len(next(iter(batch.values()))) // world_size
    own = slice(size * rank, size * (rank + 1))
    return {key: value[own].to(device) if isinstance(value, torch.Tensor) else value[own] for key, value in batch.items()}


def all_gather_if_needed(values: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """Return the values of all ranks below each other: (B, ...) to (world_size * B, ...), a scalar to (world_size,).

    `rank` is the published signature's; values stay on their own device.
    """
    if world_size == 1:
        return values
    gathered = [torch.empty_like(values) for _ in range(world_size)]
    dist.all_gather(gathered, values)
    return (torch.cat if values.dim() > 0 else torch.stack)(gathered)


def get_block_class_from_model(model: torch.nn.Module, block_class_name: str) -> type[torch.nn.Module]:
    """Return the class of a model's modules that has this name.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if type(module).__name__ == block_class_name:
            return type(module)
    raise ValueError(f"{type(model).__name__} has no module of class {block_class_name}")


def get_open_port() -> int:
    """Return a TCP port of the loopback interface that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def print_gpu_memory(rank: Optional[int] = None, message: str = "") -> None:
    """Print the bytes that PyTorch has allocated on each visible GPU; nothing without one."""
    for i in range(torch.cuda.device_count()):
        print(f"{message} rank {rank}: GPU {i}: {torch.cuda.memory_allocated(i) / 1e6:.2f} MB")


class TemporarilySeededRandom:
    """A context in which `random` and NumPy's global generator start from `seed`; afterwards both go on as if nothing had been drawn."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self._before = random.getstate(), np.random.get_state()
        random.seed(self.seed)
        np.random.seed(self.seed)

    def __exit__(self, *_: object) -> None:
        random.setstate(self._before[0])
        np.random.set_state(self._before[1])
