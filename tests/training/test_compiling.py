"""Compiled blocks: within PyTorch's limit of graphs, and a line where it is reached."""

import logging

import pytest
import torch
from small_models import small_config
from transformers import AutoModelForCausalLM

from tdpo.distributed.sharding import find_blocks
from tdpo.losses import get_objective
from tdpo.scoring.prefix_sharing import shared_prefix_batch
from tdpo.scoring.scorer import Scorer
from tdpo.training import compiling
from tdpo.training.strategies import without_randomness


@pytest.fixture
def uncounted(monkeypatch):
    """Let blocks be traced but not compiled, which takes long and makes no other graphs; forget all graphs before and after."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compile(module, backend="eager", **options))
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def losses(checkpointing: bool, compiled: bool) -> list[float]:
    """Train and evaluate on rows of many shapes: one row and several, of lengths that are multiples of 8 and others."""
    torch.manual_seed(0)
    policy, reference = (AutoModelForCausalLM.from_config(small_config("llama")) for _ in range(2))
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compiling.compile_blocks(block for model in (policy, reference) for block in find_blocks(model, None))
    scorer = Scorer(policy, reference, get_objective("tdpo2", beta=0.1))
    found = []
    for rows in (1, 3, 2):
        for length in (8, 9, 16, 21):
            without_randomness(policy)
            batch = shared_prefix_batch([([1] * 6, [[2] * length, [3] * (length + 1)])] * rows)
            loss = scorer(batch).loss
            loss.backward()
            policy.eval()
            with torch.no_grad():
                found += [loss.item(), scorer(batch).loss.item()]
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_shape_exceeds_the_limit_of_graphs(checkpointing, uncounted, caplog):
    with caplog.at_level(logging.WARNING):
        assert losses(checkpointing, True) == pytest.approx(losses(checkpointing, False), rel=1e-5)
    assert not caplog.records
    assert torch._dynamo.config.recompile_limit >= compiling.GRAPHS


def test_a_limit_that_is_reached_is_said_once(uncounted, caplog, monkeypatch):
    monkeypatch.setattr(compiling, "GRAPHS", 1)
    torch._dynamo.config.recompile_limit = 1
    with caplog.at_level(logging.WARNING):
        assert losses(False, True) == pytest.approx(losses(False, False), rel=1e-5)
    assert [record.message.partition(":")[0] for record in caplog.records] == ["torch.compile"]
