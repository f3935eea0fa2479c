"""Runs with QLoRA: fast and plain, resumed, exported, evaluated, begun from each other; and what such a run prints."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
from helpers import DATA, QUIET, ROOT, assert_close_logs, assert_same_run, compose, logs_of, run, weights_of
from runs.test_adapter_runs import LORA, measured
from transformers import AutoConfig, AutoModelForCausalLM

import export
import sample
import token_report
from tdpo.cli.check_config import check_config
from tdpo.models.tokenizer import load_tokenizer
from tdpo.utils import UserError
from tdpo.weights import is_adapter_name

METHODS = ["nf4", "int8"]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Options for a model whose widths NF4 can have."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(compose("exp_name=x", *DATA).model, None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [*DATA, f"model.name_or_path={folder}"]


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Run folders: SFT, and TDPO2 from it, by method."""
    folder, found = tmp_path_factory.mktemp("quantized"), {}
    for method in METHODS:
        options = [*model, *LORA, f"model.quantize={method}"]
        found["sft", method] = run(*options, "loss=sft", f"local_run_dir={folder}/sft-{method}")
        more = ["loss=tdpo2", f"model.archive={found['sft', method]}", f"local_run_dir={folder}/tdpo2-{method}"]
        found["tdpo2", method] = run(*options, *more)
    return found


def of_run(folder, model, method: str) -> list[str]:
    """Return the options with which the fixture has made a TDPO2 run."""
    sft = folder.with_name(folder.name.replace("tdpo2", "sft"))
    return [*model, *LORA, f"model.quantize={method}", "loss=tdpo2", f"model.archive={sft}"]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_is_at_the_reference_exactly(method, model, runs, tmp_path):
    half = run(*of_run(runs["tdpo2", method], model, method), "model.fsdp_policy_mp=bfloat16", f"local_run_dir={tmp_path}/half")
    for folder in (runs["tdpo2", method], half):
        first = logs_of(folder, "train")[0]
        assert first["loss/train"] == pytest.approx(0.6931471805599453, abs=1e-12)
        assert all(first[name] == 0 for name in first if name.startswith(("kl_train/", "rewards_train/")))
    assert logs_of(half, "train")[-1]["kl_train/chosen"] > 1e-3
    assert {x.dtype for x in weights_of(half).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "more",
    [["scoring=plain", "gradient_accumulation_steps=4"], ["reference_cache=true"], ["activation_checkpointing=true"]],
    ids=lambda more: more[0],
)
def test_options_that_change_no_numbers(more, model, runs, tmp_path):
    options = [*of_run(runs["tdpo2", "nf4"], model, "nf4"), *more, f"local_dirs=[{tmp_path}]", f"local_run_dir={tmp_path}/run"]
    assert_close_logs(logs_of(runs["tdpo2", "nf4"]), logs_of(run(*options)))


def test_int8_does_not_depend_on_the_cut(model, runs, tmp_path):
    """But for an input of a layer that lies between two of the 255 numbers, which the last bit may turn."""
    options = [*of_run(runs["tdpo2", "int8"], model, "int8"), "tokens_per_microbatch=150", f"local_run_dir={tmp_path}/run"]
    for ours, theirs in zip(logs_of(runs["tdpo2", "int8"]), logs_of(run(*options)), strict=True):
        for name in theirs:
            if name.startswith(("loss/", "kl_", "rewards_")) and "accuracies" not in name:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-2, abs=1e-2), name


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(method, model, runs, tmp_path):
    options = of_run(runs["tdpo2", method], model, method)
    first = run(*options, "n_examples=24", f"local_run_dir={tmp_path}/run")
    run(*options, f"resume={first}")
    assert_same_run(first, runs["tdpo2", method])
    state = torch.distributed.checkpoint.FileSystemReader(first / "step-40" / "state").read_metadata().state_dict_metadata
    assert all(is_adapter_name(key.removeprefix("policy.")) for key in state if key.startswith("policy."))


def test_another_quantisation_is_another_base(model, runs, tmp_path):
    options = of_run(runs["tdpo2", "nf4"], model, "nf4")
    first = run(*options, "n_examples=24", f"local_run_dir={tmp_path}/run")
    with pytest.raises(UserError, match="model.quantize"):
        run(*of_run(runs["tdpo2", "nf4"], model, "int8"), f"resume={first}")


@pytest.mark.parametrize("method", METHODS)
def test_what_a_run_exports(method, runs):
    """adapter/ on base/ by peft, hf/ by Transformers, policy.pt, are one model, and none is quantised."""
    folder = runs["tdpo2", method]
    ids = torch.randint(3, 60, (2, 20))
    named = json.loads((folder / "LATEST" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(folder / "base")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), folder / "LATEST" / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "LATEST" / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
    for config in (named, folder / "LATEST" / "hf"):
        assert "quantization_config" not in json.loads((type(folder)(config) / "config.json").read_text())
    state = weights_of(folder)
    assert all(torch.equal(state[key], tensor) for key, tensor in merged.state_dict().items())


@pytest.mark.parametrize("method,tolerance", [("nf4", 1e-4), ("int8", 0.2)])
def test_the_tools_take_such_runs(method, tolerance, runs, tmp_path):
    """They compute with dequantised weights, so with NF4 what training has computed; int8 also rounds what enters each layer."""
    folder = runs["tdpo2", method]
    evals = logs_of(folder, "eval")
    for path, log in ((folder, evals[-1]), (folder / "step-24", evals[1])):
        found = measured(path)
        assert found["seqkl/chosen"].mean == pytest.approx(log["kl_eval/chosen"], rel=tolerance) and log["kl_eval/chosen"] > 0.01
    token_report.run(compose(f"run={folder}/step-24", "n_pairs=2", f"out={tmp_path}/report.html", name="token_report"))
    out = export.run(compose(f"run={folder}/step-24", f"out={tmp_path}/out", name="export"))
    adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "step-24" / "adapter")
    expected, exported = adapter.merge_and_unload().state_dict(), AutoModelForCausalLM.from_pretrained(out).state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(exported[key], tensor, rtol=1e-6, atol=1e-7)
    sample.run(compose(f"run={folder}/step-24", "n_prompts=2", "n=1", f"out={tmp_path}/rows.jsonl", name="sample"))
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("archive", ["policy.pt", "adapter", "hf"])
def test_a_run_begins_from_any_form_of_another(archive, model, runs, tmp_path):
    """The SFT model is quantised anew, by which it changes little."""
    sft = runs["sft", "nf4"]
    options = [*model, *LORA, "model.quantize=nf4", "loss=tdpo2", "n_examples=16", "do_first_eval=true"]
    done = run(*options, f"model.archive={sft}/LATEST/{archive}", f"local_run_dir={tmp_path}/run")
    first, before = logs_of(done, "eval")[0], logs_of(sft, "eval")
    learned = before[-1]["logps_eval/chosen"] - before[0]["logps_eval/chosen"]
    assert abs(first["logps_eval/chosen"] - before[-1]["logps_eval/chosen"]) < 0.2 * abs(learned)
    assert logs_of(done, "train")[0]["loss/train"] == pytest.approx(0.6931471805599453, abs=1e-12)


@pytest.mark.parametrize(
    "given,message",
    [
        (["model.quantize=nf4"], "quantised weights cannot be trained, only adapters on them; set adapter.rank"),
        (["model.quantize=nf4", "adapter.rank=4", "trainer=FSDPTrainer"], "trainer=FSDPTrainer does not split quantised weights; use"),
        (
            ["model.quantize=int8", "adapter.rank=4", "trainer=TensorParallelTrainer"],
            "TensorParallelTrainer does not split quantised weights",
        ),
        (["model.quantize=nf4", "adapter.rank=4", "nproc_per_node=2"], "runs in one process"),
        (["model.quantize=fp4", "adapter.rank=4"], "model.quantize"),
    ],
)
def test_bad_options_end_in_a_line(given, message):
    with pytest.raises(UserError, match=message):
        check_config(compose("exp_name=x", *DATA, *given))


@pytest.mark.processes
@pytest.mark.parametrize("method", METHODS)
def test_the_library_is_silent(method, model, tmp_path):
    options = [*QUIET, *model, *LORA, f"model.quantize={method}", "loss=sft", "n_examples=8", f"local_run_dir={tmp_path}/run"]
    command = [sys.executable, "train.py", *options]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout + done.stderr
    assert f"parameters in {method}" in printed and "base: the dequantised model below the adapters" in printed
    assert not [word for word in ("MatMul8bitLt", "kernels", "Warning", "bitsandbytes", "Loading weights") if word in printed], printed
