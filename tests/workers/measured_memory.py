"""Started by test_memory.py, once per rank: trains a step and prints its peak memory, in bytes above that before the step."""

import ctypes
import os
import sys
import tempfile
from pathlib import Path

from helpers import QUIET, compose

import train

M_MMAP_THRESHOLD = -3
SMALL = ["n_examples=2", "batch_size=2", "n_eval_examples=2", "eval_every=2", "debug=true", "model.from_config.hidden_size=64"]


def resident(field: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def run(*options: str) -> None:
    overrides = [*QUIET, *options]
    train.run(compose(*overrides), overrides)


if __name__ == "__main__":
    # Freed large tensors go back to the system, so that the peak counts only memory in use.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    # A forked process reads the libraries' files into its memory when it first uses them: by a small run, before the measurement.
    libraries = [option for option in sys.argv[1:] if option.startswith(("adapter.rank=", "model.quantize="))]
    several = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    with tempfile.TemporaryDirectory() as folder:
        run(*SMALL, *libraries, "loss=tdpo2", f"local_run_dir={folder}/run")
    if "RANK" in several:
        os.environ |= several
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    run(*sys.argv[1:])
    print(f"peak {resident('VmHWM') - before}")
