"""The benchmarks: what they need to be imported."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from benchmarks import step_profile
from tdpo.scoring import distributions

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


def test_the_profile_of_a_step_knows_its_products(monkeypatch):
    """With the positions in one chunk the head has four products: logits of both models, and the gradients of states and weight."""
    monkeypatch.setitem(distributions.CHUNK, "cpu", 10**6)
    run = step_profile.make_step("tdpo2", torch.float32, 4, 4, vocabulary=96)
    run()
    events, took = step_profile.profile(run)
    products = step_profile.products_of(events)
    of_head = {key: number for key, number in products.items() if key[0] in step_profile.PRODUCTS and any(96 in shape for shape in key[1])}
    assert sum(of_head.values()) == 4
    kinds = step_profile.ATTENTION, step_profile.BACKWARD
    attention = [sum(number for (name, _), number in products.items() if name == kind) for kind in kinds]
    assert attention == [8, 4]  # four layers of policy and reference, of which the policy's have a backward pass
    parts = step_profile.parts_of(events, took, 96)
    assert set(parts) <= set(step_profile.PARTS) and sum(parts.values()) == pytest.approx(took, rel=0.2)
    assert all(parts[name] > 0 for name in step_profile.PARTS)
    assert step_profile.time_products(products, torch.float32) > 0
