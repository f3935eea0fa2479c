"""The benchmarks: what they need to be imported."""

import subprocess
import sys

import pytest
from helpers import ROOT

MISSING = """
import importlib.machinery, sys

ABSENT = {"datasets", "hydra", "omegaconf", "antlr4", "pydantic", "wandb", "bs4", "peft", "bitsandbytes", "accelerate", "trl"}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, ".")
"""


@pytest.mark.processes
@pytest.mark.parametrize("module", ["benchmarks.step", "benchmarks.loss", "benchmarks.gpu"])
def test_steps_are_measured_where_only_torch_and_transformers_are_installed(module):
    """As on many GPU machines, whose images have PyTorch and Transformers but not what reads data and configs."""
    modules = f"import {module}, tdpo.models.memory, tdpo.optimizers, tdpo.scoring.mixed_precision"
    done = subprocess.run([sys.executable, "-c", MISSING + modules], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
