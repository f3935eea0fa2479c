"""The estimated memory of a device against measured peaks of small models on the CPU."""

import re
import sys
from typing import NamedTuple, Optional

import memory_tables
import pytest
import torch
import transformers
from helpers import ROOT, compose, start_unsupervised
from omegaconf import OmegaConf

from preference_datasets import load_split
from tdpo.data.contract import PAIRS, SFT
from tdpo.losses import OBJECTIVES
from tdpo.models.adapters import attach
from tdpo.models.build import empty_model
from tdpo.models.memory import ModelShape, device_memory
from tdpo.models.tokenizer import embedded_tokenizer
from tdpo.optimizers import copies_in_step

STATES = {"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 3072}  # weights dominate
# Logits dominate. Scored plain, because fast scoring's logits are too small to be measured this way (see scoring/test_scorer.py).
LOGITS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


class Case(NamedTuple):
    """A run of two steps, of which the second has the optimizer's state from its beginning."""

    sizes: dict
    loss: str
    batch_size: int
    ranks: int = 1
    microbatches: int = 1
    rank: Optional[int] = None  # of adapters
    half: bool = False  # computes in bfloat16


def measured(case: Case, folder) -> int:
    sizes, loss, batch_size, ranks, microbatches, rank, half = case
    options = [f"model.from_config.{key}={value}" for key, value in sizes.items()]
    options += [
        f"loss={loss}",
        f"batch_size={batch_size}",
        f"n_examples={2 * batch_size}",
        f"eval_every={2 * batch_size}",
        "n_eval_examples=2",
    ]
    options += [
        f"gradient_accumulation_steps={microbatches}",
        "do_first_eval=false",
        "debug=true",
        f"scoring={'plain' if sizes is LOGITS else 'fast'}",
        f"local_run_dir={folder}/run",
        *(["trainer=FSDPTrainer"] if ranks > 1 else []),
        *([] if rank is None else [f"adapter.rank={rank}"]),
        *(["model.fsdp_policy_mp=bfloat16"] if half else []),
    ]
    commands = start_unsupervised("tests/workers/measured_memory.py", options, ranks)
    outputs = [command.communicate()[0] for command in commands]
    assert all(command.returncode == 0 for command in commands), outputs
    return int(re.search(r"peak (\d+)", outputs[-1]).group(1))  # of the last rank: rank 0 has held the whole model before


def computed(case: Case) -> int:
    sizes, loss, batch_size, ranks, microbatches, rank, half = case
    config = compose("exp_name=x")
    tokenizer = embedded_tokenizer()
    options = {"form": SFT if loss == "sft" else PAIRS, "silent": True}
    data = load_split(OmegaConf.to_container(config.datasets), "train", tokenizer, config.max_length, config.max_prompt_length, **options)
    elements = [data.element(example) for example in next(data.epochs(0))[:batch_size]]
    labels = [element[name] for element in elements for name in element if name in ("chosen_labels", "rejected_labels")]
    parts, plain = ranks * microbatches, sizes is LOGITS
    rows = [len(labels[0])] if plain else data.lengths(next(data.epochs(0))[:batch_size])
    tokens = len(labels) * max(map(len, labels)) if plain else batch_size * max(rows)
    model = empty_model(transformers.GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes))
    if rank is not None:
        attach(model, OmegaConf.merge(config.adapter, {"rank": rank}), torch.float32, 0)
    shape = ModelShape.of_model(model)
    memory = device_memory(
        shape,
        tokens=tokens // parts,
        response_tokens=sum(label != -100 for row in labels for label in row) // parts,
        plain=plain,
        shards=ranks,
        needs_reference=OBJECTIVES[loss].needs_reference,
        needs_kl=OBJECTIVES[loss].needs_kl,
        compute_bytes=2 if half else 4,
        optimizer_copies=copies_in_step("RMSprop", {}, ranks > 1, False),
        activation_checkpointing=False,
        accumulates_whole=microbatches > 1,
    )
    return sum(memory.values())


@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "case",
    [
        Case(STATES, "tdpo2", 2),
        Case(STATES, "tdpo2", 4, ranks=2, microbatches=2),
        Case(LOGITS, "tdpo2", 2048),
        Case(STATES, "tdpo2", 2, rank=8),
        Case(STATES, "tdpo2", 4, microbatches=2, half=True),
        Case(STATES, "tdpo2", 4, ranks=2, half=True),
    ],
    ids=["weights", "whole gradients", "logits", "adapters", "bfloat16", "bfloat16, two shards"],
)
def test_estimate_matches_the_measured_peak(case, tmp_path):
    """Within 20%: interpreter, tokens and allocator take 10 to 40 MB of these 500 to 1,000 MB, and versions of PyTorch differ."""
    assert computed(case) == pytest.approx(measured(case, tmp_path), rel=0.2)


def test_tables_in_docs_are_up_to_date():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert memory_tables.tables() in text and memory_tables.lora_table() in text and memory_tables.qlora_table() in text


def test_parameter_counts_of_the_documented_models():
    """The counts in their papers: Pythia 2.8B has 2.78 billion parameters with both embeddings, Llama 3 has 8.03 and 70.6 billion."""
    sizes = {name: ModelShape.of(config).parameters / 1e9 for name, config in memory_tables.MODELS.items()}
    assert sizes == pytest.approx({"Pythia 2.8B": 2.775, "Llama 3 8B": 8.030, "Llama 3 70B": 70.554}, abs=1e-3)
