"""What a run says that it will cost, against what it takes."""

import re

import pytest
import torch
from helpers import DATA, MINI, PREFERENCE, compose, run
from transformers import AutoTokenizer

import train
from preference_datasets import default_options, load_split
from tdpo.data.batching import BatchStream
from tdpo.data.contract import PAIRS
from tdpo.microbatches import cut_into_rows
from tdpo.optimizers import bytes_per_weight
from tdpo.scoring.prefix_sharing import shared_prefix_batch
from tdpo.scoring.probes import packing_of
from tdpo.training.costs import gigabytes

LARGER = ["model=tiny", "model.from_config.hidden_size=256", "batch_size=8", "n_examples=16", "eval_every=8", "n_eval_examples=8"]


def said(capsys, *options) -> dict[str, list[float]]:
    """Dry-run, and return the numbers of the lines about costs, by their first word."""
    assert train.run(compose("exp_name=x", "dry_run=true", *options)) == ""
    lines = re.findall(r"^(memory|tokens|disk): (.*)$", capsys.readouterr().out, re.MULTILINE)
    return {name: [float(number.replace(",", "")) for number in re.findall(r"[\d,.]*\d(?:e-?\d+)?", line)] for name, line in lines}


QUANTIZED = ["adapter.rank=8", "model.quantize=nf4", "model.fsdp_policy_mp=bfloat16"]


@pytest.mark.parametrize("more", [[], ["adapter.rank=8"], QUANTIZED, ["save_policy=never"], ["optimizer=AdamW"]], ids=str)
def test_the_disk_that_checkpoints_take(more, tmp_path, capsys):
    found = said(capsys, *LARGER, *more)["disk"]
    folder = run(*LARGER, *more, f"local_run_dir={tmp_path}/run")
    parts = [name for name in ("step-8", "step-16", "base") if (folder / name).exists()]
    sizes = [sum(file.stat().st_size for file in (folder / part).rglob("*") if file.is_file()) / 1e9 for part in parts]
    assert found == pytest.approx(sizes, rel=0.15, abs=2e-4)


def test_the_tokens_of_steps_and_microbatches(capsys):
    computed, most = said(capsys, *PREFERENCE, "gradient_accumulation_steps=4", "n_epochs=1")["tokens"]
    data = {"hh": {**default_options("hh"), "path": str(MINI / "data")}}
    split = load_split(data, "train", AutoTokenizer.from_pretrained(MINI / "model"), 64, 32, PAIRS, silent=True)
    sizes = []
    for examples in BatchStream(split, 8, seed=0, n_epochs=1):
        rounds = cut_into_rows(split.lengths(examples), 1, 4, packing_of(32, 64))
        in_order = [([split.example(examples[i]) for row in rows for i in row], list(map(len, rows))) for (rows,) in rounds]
        sizes.append([shared_prefix_batch(some, per_row=per_row).input_ids.numel() for some, per_row in in_order])
    assert computed == pytest.approx(sum(map(sum, sizes)) / len(sizes), rel=0.05)
    assert most == pytest.approx(max(map(max, sizes)), rel=0.05)


def test_memory_is_that_of_the_whole_run_and_its_adapters(capsys):
    some = ([], ["adapter.rank=4"], ["adapter.rank=4", "model.quantize=nf4"], TWO)
    full, lora, packed, halved = (said(capsys, *LARGER, "loss=tdpo2", *more)["memory"][0] for more in some)
    assert packed < lora < 0.75 * full and halved < 0.8 * full  # halved: 0.77, because activations are not sharded


TWO = ["trainer=FSDPTrainer", "nproc_per_node=2"]


def test_a_run_that_does_not_fit_is_told_so(capsys, monkeypatch):
    monkeypatch.setattr("tdpo.training.costs.device_total", lambda device: 10**6)
    train.run(compose("exp_name=x", "dry_run=true", *DATA))
    assert "warning: that is more than there is; try adapter.rank=16" in capsys.readouterr().out


def test_a_cut_that_fits_is_proposed(capsys, monkeypatch):
    """Not more than fits by the estimate itself, and no less than a tenth below."""
    monkeypatch.setattr("tdpo.training.costs.device_total", lambda device: 60 * 10**6)
    options = [*LARGER, "batch_size=64", "n_examples=64", "eval_every=64", "loss=tdpo2"]
    train.run(compose("exp_name=x", "dry_run=true", *options))
    tokens = int(re.search(r"set tokens_per_microbatch=(\d+), which would fit, or try", capsys.readouterr().out).group(1))
    needed, *_, has = said(capsys, *options, f"tokens_per_microbatch={tokens}")["memory"]
    assert 0.75 * has < needed < has
    monkeypatch.setattr("tdpo.training.costs.device_total", lambda device: 10**6)
    train.run(compose("exp_name=x", "dry_run=true", *options))
    assert "tokens_per_microbatch=" not in capsys.readouterr().out.partition("warning: that is more")[2]


def test_what_is_tried_next_depends_on_what_was_tried(capsys, monkeypatch):
    monkeypatch.setattr("tdpo.training.costs.device_total", lambda device: 10**3)
    for more, remedy in ((["adapter.rank=4"], "model.quantize=nf4"), (QUANTIZED, "a smaller max_length")):
        train.run(compose("exp_name=x", "dry_run=true", *LARGER, *more))
        assert f"try {remedy}, activation_checkpointing=true" in capsys.readouterr().out


def test_states_of_optimizers():
    assert [bytes_per_weight(name, {}, torch.float32) for name in ("SGD", "RMSprop", "AdamW")] == [0, 4, 8]
    assert 0 < bytes_per_weight("Adafactor", {}, torch.float32) < 0.4


def test_three_digits():
    assert [gigabytes(size) for size in (1.234e12, 1.2345e10, 5e6)] == ["1234", "12.3", "0.005"]
