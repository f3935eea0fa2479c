"""Run by helpers.Ranks under torchrun: does the jobs that appear in a folder, one after another, by the same processes."""

import json
import os
import sys
import time
from pathlib import Path

import sharded_families
import torch
from helpers import compose, run

import sample
from tdpo.distributed.launch import process_group
from tdpo.distributed.world import World
from tdpo.utils import PeerError, RunError, UserError


def train(world: World, *overrides: str) -> str:
    return str(run(*overrides, world=world))


def sample_prompts(world: World, *overrides: str) -> str:
    return sample.run(compose(*overrides, name="sample"), (), world)


def check_families(world: World, *styles: str) -> list[str]:
    return sharded_families.check_all(world, styles)


FUNCTIONS = {function.__name__: function for function in (train, sample_prompts, check_families)}


def next_job(folder: Path, number: int) -> list:
    file = folder / f"job-{number}.json"
    while not file.exists():
        if not any(Path(f"/proc/{user.name.removeprefix('user-')}").exists() for user in folder.glob("user-*")):
            return ["end", []]
        time.sleep(0.02)
    return json.loads(file.read_text())


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # as of processes that share a machine; bfloat16 kernels round by their number
    with process_group(timeout_secs=120) as world:
        number = 0
        while True:
            number += 1
            function, arguments = world.from_first(lambda number=number: next_job(folder, number))
            if function == "end":
                return
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # signs of life of its own for each run
            result = {"value": None, "error": None}
            try:
                result["value"] = FUNCTIONS[function](world, *arguments)
            except (UserError, RunError, PeerError) as error:  # raised by all ranks together, which stay in step
                result["error"] = [type(error).__name__, str(error)]
            new = folder / f"new-{world.rank}.json"
            new.write_text(json.dumps(result))
            new.rename(folder / f"done-{number}-{world.rank}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
