"""Run by test_memory.py, in one process or several: trains a step and prints the last rank's peak, in bytes above what it began with."""

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
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:  # rank 0 has held the whole model before
        print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}")
