"""Train one step, in one process or several, and print how many bytes the last rank's peak memory is above its memory at the start.

Run by tests/models/test_memory_estimate.py.
"""

import os
import resource
import sys

from helpers import QUIET, compose

import train

if __name__ == "__main__":
    overrides = [*QUIET, *sys.argv[1:]]
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    train.run(compose(*overrides), overrides)
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:  # not rank 0, which has held the whole model
        print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}")
