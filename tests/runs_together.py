"""Run by helpers.run_together under torchrun: the runs whose overrides a JSON file lists, one after another, by the same processes."""

import json
import sys

import torch
from conftest import run

from tdpo.distributed.launch import process_group

if __name__ == "__main__":
    torch.set_num_threads(1)  # as of processes that share a machine; bfloat16 kernels round by their number
    with open(sys.argv[1]) as file:
        runs = json.load(file)
    with process_group(timeout_secs=120) as world:  # one group for all: leaving and joining again costs seconds a run
        for overrides in runs:
            run(*overrides, world=world)
