"""eval.py: agrees with a run's own eval on the same pairs, compares several runs in one table, and rejects invalid input."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import DATA, MINI, PREFERENCE, compose, logs_of, run

import eval as evaluate
from tdpo.analysis.evaluation import by_prompt, estimate
from tdpo.utils import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = [*PREFERENCE, "n_examples=32", "do_first_eval=false", "lr=2e-3", "warmup_steps=0", "n_eval_examples=24"]
    return [run(*options, f"loss={loss}", f"local_run_dir={folder}/{loss}") for loss in ("tdpo2", "dpo")]


def evaluated(runs, *overrides):
    return evaluate.run(compose(f"run=[{','.join(map(str, runs))}]", "n_pairs=24", "n_prompts=6", "n=3", *overrides, name="eval"))


@pytest.fixture(scope="module")
def results(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "eval.json"
    return evaluated(runs, f"out={out}"), json.loads(out.read_text())


def test_agrees_with_the_eval_of_the_run(runs, results):
    log = logs_of(runs[0], "eval")[-1]
    found = {name: value.mean for name, value in results[0][str(runs[0])].items()}
    names = {
        "accuracy/logratio": "logratio_eval/accuracies",
        "accuracy/reward": "rewards_eval/accuracies",
        "accuracy/logit": "logits_eval/accuracies",
    }
    names |= {"seqkl/chosen": "kl_eval/chosen", "seqkl/rejected": "kl_eval/rejected", "seqkl/margin": "kl_eval/margin"}
    assert {name: found[name] for name in names} == pytest.approx({name: log[metric] for name, metric in names.items()}, rel=1e-4, abs=1e-5)
    dpo = results[0][str(runs[1])]
    assert dpo["accuracy/logit"].mean == pytest.approx(logs_of(runs[1], "eval")[-1]["logits_eval/accuracies"])
    assert dpo["seqkl/chosen"].mean > 0.01  # the run itself did not compute it


def test_file_contains_all_measures(runs, results):
    table, written = results
    assert list(written["results"]) == [str(path) for path in runs]
    for name, measures in written["results"].items():
        assert set(measures) == set(written["measures"]) - {"samples/reward"}  # HH rows have no gold reward
        for measure, value in measures.items():
            assert value == table[name][measure]._asdict() and value["low"] <= value["mean"] <= value["high"]
            assert value["examples"] == 6 if measure.startswith("samples/") else 20 < value["examples"] <= 24


def test_run_without_reference(tmp_path, capsys):
    sft = run(*DATA, "n_examples=8", "do_first_eval=false", f"local_run_dir={tmp_path}/sft")
    (measures,) = evaluated([sft]).values()
    assert "samples/kl" not in measures and "accuracy/logratio" not in measures and measures["samples/entropy"].mean > 1
    assert "no reference is known, so accuracies and divergences are left out: give reference=<weights>" in capsys.readouterr().out
    (measures,) = evaluated([sft], f"reference={sft}/LATEST/policy.pt", "n_prompts=0").values()
    assert measures["seqkl/chosen"].mean == 0 and "accuracy/logit" not in measures and "samples/entropy" not in measures


def test_error_messages(runs):
    with pytest.raises(UserError, match="split=dev: must be 'train' or 'test'"):
        evaluated(runs, "split=dev")
    with pytest.raises(UserError, match="reward=/nowhere cannot be loaded"):
        evaluated(runs, "reward=/nowhere")
    with pytest.raises(UserError, match="max_prompt_length=32 leaves no room for a response: it must be below max_length=16"):
        evaluated(runs, "max_length=16")
    with pytest.raises(UserError, match="out=/proc/nope/eval.json cannot be written"):
        evaluated(runs, "out=/proc/nope/eval.json")


def test_reference_weights_have_changed(tmp_path):
    """The SFT model at the recorded path has been replaced since the run."""
    archive = tmp_path / "policy.pt"
    shutil.copy(MINI / "sft_policy.pt", archive)
    trained = run(*PREFERENCE, f"model.archive={archive}", "n_examples=8", "do_first_eval=false", f"local_run_dir={tmp_path}/run")
    content = torch.load(archive, weights_only=True)
    content["state"]["gpt_neox.final_layer_norm.bias"] += 0.1
    torch.save(content, archive)
    with pytest.raises(UserError, match="no longer holds the weights that this run started from: give reference="):
        evaluated([trained])
    assert evaluated([trained], f"reference={MINI}/sft_policy.pt", "n_prompts=0")


def test_pairs_of_a_prompt_count_as_one_example():
    """Ten equal pairs per prompt give the same interval as one."""
    values = np.random.default_rng(0).normal(size=200)
    alone, repeated = estimate(values), estimate(*by_prompt(np.repeat(values, 10), np.repeat(np.arange(200), 10)))
    assert repeated == pytest.approx(alone)
    means, weights = by_prompt(np.array([1.0, 3.0, 5.0]), [4, 4, 2])
    assert means.tolist() == [5.0, 2.0] and weights.tolist() == [1, 2]
