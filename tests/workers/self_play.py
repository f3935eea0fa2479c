"""Started by test_family.py: experiments/spin.py, with sampling in this process, because a start takes longer, and training in its own."""

import runpy
import sys

from helpers import ROOT, compose

import sample
from experiments import scripts

run_script = scripts.run_script


def sampling_here(script: str, *arguments: str) -> int:
    if script == "sample.py":
        sample.run(compose(*arguments, name="sample"))
        return 0
    return run_script(script, *arguments)


if __name__ == "__main__":
    scripts.run_script = sampling_here
    sys.argv[0] = str(ROOT / "experiments" / "spin.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
