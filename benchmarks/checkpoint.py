"""Time and size of a checkpoint, part by part: python benchmarks/checkpoint.py --gigabytes 1

A model of float32 weights with RMSprop's state (as many numbers again) is saved and checked by one process. Median of --rounds.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch
import torch.distributed.checkpoint as dcp

from tdpo.checkpointing.checkpoints import damaged_files, policy_is_sound, save_checkpoint
from tdpo.checkpointing.state_reader import read_policy
from tdpo.distributed.world import World
from tdpo.files import entries_of
from tdpo.models.archive import read_archive
from tdpo.utils import not_finite

MATRIX = 1024 * 1024  # numbers per tensor


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def size_of(path: str) -> int:
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(place, file)) for place, _, files in os.walk(path) for file in files)


def one_round(policy: dict, tensors: dict, folder: str) -> tuple[dict[str, float], dict[str, int]]:
    """Save and check once.

    Args:
        policy: state dict.
        tensors: what resuming needs, the policy included.
        folder: an empty folder.

    Returns:
        seconds and bytes by part.
    """
    world, progress = World(), {"examples": 8, "eval_metrics": {}}
    times = {"weights are finite": seconds(lambda: not_finite(policy))}
    times["write policy.pt alone"] = seconds(lambda: torch.save({"state": policy}, os.path.join(folder, "policy.pt")))
    times["write state/ alone"] = seconds(lambda: dcp.save(tensors, checkpoint_id=os.path.join(folder, "state"), no_dist=True))
    files = ["policy.pt", *(os.path.join("state", file) for file in os.listdir(os.path.join(folder, "state")))]
    times["hash both"] = seconds(lambda: entries_of(folder, files, ""))
    sizes = {name: size_of(os.path.join(folder, name)) for name in ("policy.pt", "state")}
    for name in ("policy.pt", "state"):
        (os.remove if name == "policy.pt" else shutil.rmtree)(os.path.join(folder, name))
    times["save, save_policy=always"] = seconds(lambda: save_checkpoint(world, folder, policy, tensors, progress))
    checkpoint = os.path.join(folder, "step-8")
    times["check when resuming"] = seconds(lambda: damaged_files(world, checkpoint))
    times["check policy.pt as an archive"] = seconds(lambda: policy_is_sound(os.path.join(checkpoint, "policy.pt")))
    times["read policy.pt as an archive"] = seconds(lambda: [tensor.clone() for tensor in read_archive(checkpoint).values()])
    shutil.rmtree(checkpoint)
    times["save, save_policy=never"] = seconds(lambda: save_checkpoint(world, folder, None, tensors, progress))
    times["read state/ as an archive"] = seconds(lambda: read_policy(checkpoint))
    return times, sizes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write; default: the system's folder for temporary files")
    arguments = parser.parse_args()
    count = max(1, round(arguments.gigabytes * 1e9 / 4 / MATRIX))
    policy = {f"layers.{i}": torch.randn(1024, 1024) for i in range(count)}
    tensors = {"policy": policy, "optimizer": {name: {"square_avg": tensor.square()} for name, tensor in policy.items()}}
    rounds, sizes = [], {}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            times, sizes = one_round(policy, tensors, folder)
            rounds.append(times)
    print(f"weights {count * MATRIX * 4 / 1e9:.2f} GB; policy.pt {sizes['policy.pt'] / 1e9:.2f} GB, state/ {sizes['state'] / 1e9:.2f} GB")
    for name in rounds[0]:
        values = [times[name] for times in rounds]
        print(f"{name:32} {statistics.median(values):6.2f} s   ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
