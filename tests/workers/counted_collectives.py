"""Started by test_step_time.py: shards small models over 8 ranks, of which only this one exists, trains a step, prints its collectives."""

import contextlib
import json
import sys
from collections import Counter
from unittest.mock import patch

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from tdpo.distributed.sharding import shard_scorer
from tdpo.distributed.world import World
from tdpo.losses import get_objective
from tdpo.models.adapters import OwnReference, attach
from tdpo.scoring.prefix_sharing import shared_prefix_batch
from tdpo.scoring.scorer import Scorer

RANKS = 8
KINDS = {  # torch 2.13 has new names for two of them
    "gather": ("all_gather_into_tensor", "all_gather_single"),
    "reduce": ("reduce_scatter_tensor", "reduce_scatter_single"),
    "all-reduce": ("all_reduce",),
}


class Counted(contextlib.ExitStack):
    """A context in which FSDP's collectives are counted: `found` has the number by phase, kind and bytes of the whole tensor."""

    def __enter__(self) -> "Counted":
        super().__enter__()
        self.found, self.phase = Counter(), ""
        for kind, name in ((kind, name) for kind, names in KINDS.items() for name in names if hasattr(dist, name)):
            self.enter_context(patch.object(dist, name, self.counting(kind, getattr(dist, name))))
        return self

    def counting(self, kind: str, collective):
        def count(*arguments, **keywords):
            sizes = [x.numel() * x.element_size() for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]
            self.found[self.phase, kind, max(sizes)] += 1
            return collective(*arguments, **keywords)

        return count


def sharded(family: str, sizes: dict, replicas: int, rank: int) -> Scorer:
    """Return a sharded scorer that computes in bfloat16, with float32 weights or, if rank > 0, adapters."""
    config = AutoConfig.for_model(family, **sizes)
    policy, reference = (AutoModelForCausalLM.from_config(config, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16))
    if rank:
        adapter = {"rank": rank, "alpha": 16, "targets": "all-linear", "rslora": False, "init": "uniform"}
        policy.to(torch.bfloat16)
        attach(policy, OmegaConf.create(adapter), torch.float32, 0)
        reference = OwnReference(policy)
    scorer = Scorer(policy, reference, get_objective("tdpo2", beta=0.1, alpha=0.5))
    shard_scorer(scorer, World(size=RANKS).mesh(replicas), None, torch.bfloat16, torch.float32)
    return scorer


def run(family: str, sizes: dict, microbatches: int, replicas: int, reduce_once: bool, rank: int) -> list:
    """Train one step. Returns [phase, kind, bytes, count] of all collectives; the phase forward includes the reference."""
    scorer = sharded(family, sizes, replicas, rank)
    batch = shared_prefix_batch([([1, 2, 3], [[4, 5, 6], [7, 8]])] * 2)
    with Counted() as counted:
        for i in range(microbatches):
            if reduce_once:
                scorer.set_requires_gradient_sync(i == microbatches - 1)
            counted.phase = "forward"
            loss = scorer(batch).loss
            counted.phase = "backward"
            loss.backward()
    return [[*key, count] for key, count in counted.found.items()]


if __name__ == "__main__":
    torch.manual_seed(0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    World.__init__ = lambda self, size: self.__dict__.update(size=size, device=torch.device("cpu"), timeout=60.0)  # no second group
    print("counted", json.dumps([run(*case) for case in json.loads(sys.argv[1])]))
    dist.destroy_process_group()
