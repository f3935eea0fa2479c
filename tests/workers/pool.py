"""Code of the forked processes (helpers.Command, helpers.Ranks): run a script of the repository, or serve as a rank."""

import os
import runpy
import sys
from multiprocessing.connection import Connection

import torch

from tdpo.distributed.launch import process_group
from tdpo.utils import PeerError, RunError, UserError


def run_script(script: str, arguments: list[str], environment: dict[str, str], output: str, folder: str) -> None:
    """Run `python -u script arguments` in a folder, with the given environment, and write its output to a file."""
    os.chdir(folder)
    _become(environment, output)
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


def serve(jobs: Connection, environment: dict[str, str], output: str) -> None:
    """Serve as a rank: for each (function, arguments) received, send back (its result, None) or (None, its error)."""
    import helpers  # not at the top, because helpers imports this module
    import sharded_families

    import sample

    functions = {
        "train": lambda world, *overrides: str(helpers.run(*overrides, world=world)),
        "sample": lambda world, *overrides: sample.run(helpers.compose(*overrides, name="sample"), (), world),
        "check_families": lambda world, *styles: sharded_families.check_all(world, styles),
    }
    _become({**os.environ, **environment, "OMP_NUM_THREADS": "1"}, output)
    with process_group(timeout_secs=120) as world:
        number = 0
        while True:
            number += 1
            try:
                function, arguments = jobs.recv()
            except EOFError:  # the process that sends the jobs has ended
                return
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # separate heartbeats for each run
            try:
                jobs.send((functions[function](world, *arguments), None))
            except (UserError, RunError, PeerError) as error:  # raised on all ranks together, so that these stay in step
                jobs.send((None, error))


def _become(environment: dict[str, str], output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with open(output, "a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
