"""Measure how long a run with many pairs takes to start, first and from the token cache, and how long its steps wait for data.

    python benchmarks/data.py                      # 100,000 pairs of random words of the embedded reviews
    python benchmarks/data.py --rows /local/hh-rlhf --tokenizer /local/tokenizer

The script prints the seconds of a first and a second load, with the number of busy cores (CPU seconds per second, child processes
included). Then it trains the embedded model on these data, and prints the share of time that its steps waited for a batch. This share is
an upper bound, because real models are far larger and their steps slower.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import train  # noqa: E402
import trainers  # noqa: E402
from preference_datasets import default_options, load_split  # noqa: E402
from tdpo.data import batching, reviews  # noqa: E402
from tdpo.models.tokenizer import embedded_tokenizer  # noqa: E402


def write_pairs(folder: Path, pairs: int, rows: str | None) -> None:
    """Write train.jsonl.gz in HH's form: random words of about HH's lengths, or the given rows, repeated with a distinct number each."""
    if rows is not None:
        with gzip.open(Path(rows) / "train.jsonl.gz", "rt") as file:
            given = [json.loads(line) for line in file]
    draw, words = random.Random(0), reviews.vocabulary()
    with gzip.open(folder / "train.jsonl.gz", "wt", compresslevel=1) as file:
        for i in range(pairs):
            if rows is not None:
                row = {
                    k: given[i % len(given)][k].replace("\n\nHuman:", f"\n\nHuman: ({i // len(given)})", 1) for k in ("chosen", "rejected")
                }
            else:
                prompt, chosen, rejected = (" ".join(draw.choices(words, k=draw.randint(5, n))) for n in (200, 90, 110))
                row = {k: f"\n\nHuman: {i} {prompt}\n\nAssistant: {text}" for k, text in (("chosen", chosen), ("rejected", rejected))}
            file.write(json.dumps(row) + "\n")


def cpu_seconds() -> float:
    """Return the CPU seconds used by this process and its ended children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def timed_load(options: dict, tokenizer, cache: str):
    """Load the train split. Returns (split, seconds, cores that were busy on average)."""
    started, cpu = time.perf_counter(), cpu_seconds()
    split = load_split(options, "train", tokenizer, 512, 256, cache_dir=cache)
    elapsed = time.perf_counter() - started
    return split, elapsed, (cpu_seconds() - cpu) / elapsed


def waiting_share(folder: Path, cache: str, steps: int) -> tuple[float, float]:
    """Train the embedded model on these rows. Returns (share of the time spent waiting for data, seconds per step)."""
    waits, ends = [], []
    prefetched = batching.prefetched

    def timed_ahead(prepare, items):
        prepared = prefetched(prepare, items)
        while True:
            started = time.perf_counter()
            value = next(prepared, None)
            if value is None:
                return
            waits.append(time.perf_counter() - started)
            yield value
            ends.append(time.perf_counter())

    trainers.prefetched = timed_ahead
    overrides = ["exp_name=data", "datasets=[hh]", f"datasets.hh.path={folder}", "loss=tdpo2", f"n_examples={64 * steps}", "batch_size=64"]
    overrides += ["do_first_eval=false", "n_eval_examples=64", "sample_during_eval=false", "debug=true", "wandb.enabled=false"]
    overrides += [f"local_dirs=[{cache}]", f"local_run_dir={folder}/run", "max_length=512", "max_prompt_length=256"]
    overrides += ["model.from_config.max_position_embeddings=512", "gradient_accumulation_steps=4", "minimum_log_interval_secs=1000"]
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base=None):
        config = hydra.compose("config", overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        train.run(config, overrides)
    waits, ends = waits[:steps], ends[:steps]  # later ones belong to the last eval
    return sum(waits[2:]) / (ends[-1] - ends[1]), (ends[-1] - ends[1]) / (steps - 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--rows", help="a folder with HH's train.jsonl.gz")
    parser.add_argument("--tokenizer", help="a folder; default: the embedded one, one token per word")
    parser.add_argument("--steps", type=int, default=12, help="the first two are not counted")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else embedded_tokenizer()
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary), os.path.join(temporary, "cache")
        write_pairs(folder, arguments.pairs, arguments.rows)
        (folder / "test.jsonl.gz").write_bytes((folder / "train.jsonl.gz").read_bytes())
        options = {"hh": {**default_options("hh"), "path": str(folder)}}
        cores = len(os.sched_getaffinity(0))
        for name in ("first", "second"):
            split, elapsed, busy = timed_load(options, tokenizer, cache)
            print(f"{name} start: {elapsed:.1f} s, {busy:.2f} of {cores} cores busy; {split.describe()}")
        share, seconds = waiting_share(folder, cache, arguments.steps)
        print(f"steps of {seconds:.2f} s wait {share:.2%} of the time for data")


if __name__ == "__main__":
    main()
