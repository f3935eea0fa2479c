"""Runs with LoRA: fast and plain, one rank and several, resumed, exported, evaluated, and begun from each other."""

import json
from pathlib import Path

import peft
import pytest
import torch
from helpers import (
    ARCHIVE,
    DATA,
    MINI,
    PREFERENCE,
    SHARDED,
    assert_close_logs,
    assert_same_run,
    compose,
    logs_of,
    run,
    weights_of,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eval as eval_tool
import export
import sample
import token_report
from tdpo.cli.check_config import check_config
from tdpo.utils import UserError
from tdpo.weights import is_adapter_name

LORA = ["adapter.rank=4", "adapter.alpha=8", "lr=5e-3", "n_examples=40", "n_eval_examples=13", "eval_batch_size=5", "eval_every=24"]
LOSSES = {
    "sft": DATA,
    "tdpo2": PREFERENCE,
    "simpo": [*DATA, ARCHIVE, "loss=simpo"],  # no reference
    "kto": [*DATA, ARCHIVE, "loss=kto", "datasets.hh.unpair=true"],  # the reference scores mismatched responses too
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders by loss, scored fast on one rank."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: run(*options, *LORA, f"local_run_dir={folder}/{name}") for name, options in LOSSES.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_fast_plain_and_cut_runs_have_the_same_logs(name, runs, tmp_path):
    logs = logs_of(runs[name])
    plain = run(*LOSSES[name], *LORA, "scoring=plain", "gradient_accumulation_steps=4", f"local_run_dir={tmp_path}/plain")
    assert_close_logs(logs, logs_of(plain))
    assert logs[0]["loss/eval"] != logs[-1]["loss/eval"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n,more", [(2, []), (4, ["parallel.replicas=2"])])
def test_sharded_runs_have_the_same_logs(name, n, more, runs, ranks, tmp_path):
    """Also with the model sharded within pairs of ranks."""
    sharded = ranks(n).run(*LOSSES[name], *LORA, *SHARDED, *more, f"local_run_dir={tmp_path}/run")
    assert_close_logs(logs_of(runs[name]), logs_of(sharded))
    ours, theirs = (load_file(folder / "LATEST" / "adapter" / "adapter_model.safetensors") for folder in (runs[name], sharded))
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=5e-3, atol=1e-5)  # RMSprop magnifies rounding: 1.2e-3 measured


def test_the_first_step_is_at_the_reference_exactly(runs, tmp_path):
    """In float32, and with frozen weights and computation in bfloat16 below adapters in float32."""
    half = run(*PREFERENCE, *LORA, "model.fsdp_policy_mp=bfloat16", f"local_run_dir={tmp_path}/half")
    for folder in (runs["tdpo2"], half):
        first = logs_of(folder, "train")[0]
        assert first["loss/train"] == pytest.approx(0.6931471805599453, abs=1e-12)
        assert all(first[name] == 0 for name in first if name.startswith(("kl_train/", "rewards_train/")))
    adapters = load_file(half / "LATEST" / "adapter" / "adapter_model.safetensors")
    assert {x.dtype for x in adapters.values()} == {torch.float32} and {x.dtype for x in weights_of(half).values()} == {torch.bfloat16}


@pytest.mark.parametrize("more", [["reference_cache=true"], ["activation_checkpointing=true"]], ids=lambda more: more[0])
def test_options_that_change_no_numbers(more, runs, tmp_path):
    options = [*PREFERENCE, *LORA, *more, f"local_dirs=[{tmp_path}]", f"local_run_dir={tmp_path}/run"]
    assert_close_logs(logs_of(runs["tdpo2"]), logs_of(run(*options)))


@pytest.mark.parametrize("name", ["sft", "tdpo2"])
def test_a_resumed_run_is_the_uninterrupted_one(name, runs, tmp_path):
    first = run(*LOSSES[name], *LORA, "n_examples=24", f"local_run_dir={tmp_path}/run")
    run(*LOSSES[name], *LORA, f"resume={first}")
    assert_same_run(first, runs[name])
    state = torch.distributed.checkpoint.FileSystemReader(first / "step-40" / "state").read_metadata().state_dict_metadata
    assert all(is_adapter_name(key) for key in state if key.startswith("policy."))
    assert (runs[name] / "LATEST" / "policy.pt").exists() and not (runs[name] / "step-24" / "policy.pt").exists()  # save_policy=final


def test_another_base_is_refused(runs, tmp_path):
    first = run(*DATA, "loss=sft", *LORA, "n_examples=24", f"local_run_dir={tmp_path}/run")
    with pytest.raises(UserError, match="the weights below the adapters are not those of"):
        run(*DATA, "loss=sft", *LORA, ARCHIVE, f"resume={first}")
    with pytest.raises(UserError, match="adapter.rank=8 .was 4."):
        run(*DATA, "loss=sft", *LORA, "adapter.rank=8", f"resume={first}")


def test_what_a_run_exports(runs):
    """adapter/ on its base by peft, hf/ by Transformers, and policy.pt are one model; peft finds the SFT model, not the raw one."""
    ids = torch.randint(3, 60, (2, 20))
    for name, base in (("sft", MINI / "model"), ("tdpo2", runs["tdpo2"] / "base")):
        latest = runs[name] / "LATEST"
        settings = json.loads((latest / "adapter" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(base) and settings["r"] == 4
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), latest / "adapter").eval()
        merged = AutoModelForCausalLM.from_pretrained(latest / "hf").eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)
        state = weights_of(runs[name])
        assert all(torch.equal(state[key], tensor) for key, tensor in merged.state_dict().items())
    sft, base = torch.load(MINI / "sft_policy.pt", weights_only=True)["state"], AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(tensor, sft[key]) for key, tensor in base.items())
    assert not (runs["sft"] / "base").exists()  # the folder of the model is its base


def measured(path, **options):
    given = [f"run={path}", "n_prompts=0", "n_pairs=13", *(f"{key}={value}" for key, value in options.items())]
    (measures,) = eval_tool.run(compose(*given, name="eval")).values()
    return measures


def test_eval_of_checkpoints_is_that_of_training(runs, tmp_path):
    """Evaluate the newest checkpoint, which has policy.pt, an earlier one, which has only adapters, and the earlier one's adapter/."""
    folder = runs["tdpo2"]
    evals = logs_of(folder, "eval")
    for path, log in ((folder, evals[-1]), (folder / "step-24", evals[1]), (folder / "step-24" / "adapter", evals[1])):
        found = measured(path)
        assert found["seqkl/chosen"].mean == pytest.approx(log["kl_eval/chosen"], rel=1e-4) and log["kl_eval/chosen"] > 0.1
        assert found["accuracy/reward"].mean == pytest.approx(log["rewards_eval/accuracies"])
    page = tmp_path / "report.html"
    token_report.run(compose(f"run={folder}/step-24", "n_pairs=2", f"out={page}", name="token_report"))
    assert page.stat().st_size > 1000


def test_an_early_checkpoint_is_exported_and_sampled(runs, tmp_path):
    out = export.run(compose(f"run={runs['tdpo2']}/step-24", f"out={tmp_path}/out", name="export"))
    base = AutoModelForCausalLM.from_pretrained(runs["tdpo2"] / "base")
    expected = peft.PeftModel.from_pretrained(base, runs["tdpo2"] / "step-24" / "adapter").merge_and_unload().state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(loaded[key], tensor, rtol=1e-6, atol=1e-7)
    rows = sample.run(compose(f"run={runs['tdpo2']}/step-24", "n_prompts=2", "n=1", f"out={tmp_path}/rows.jsonl", name="sample"))
    assert len(Path(rows).read_text().splitlines()) == 2


@pytest.mark.parametrize("given", ["run", "step-24", "adapter"])
def test_a_run_from_an_sft_adapter_has_the_sft_model_as_reference(given, runs, tmp_path):
    """The first loss is ln 2, and log-probabilities are those of the SFT run's eval, not those of the raw model."""
    sft = runs["sft"]
    archive = {"run": sft, "step-24": sft / "step-24", "adapter": sft / "LATEST" / "adapter"}[given]
    options = [*DATA, "loss=tdpo", f"model.archive={archive}", *LORA, "n_examples=16", "do_first_eval=true"]
    done = run(*options, f"local_run_dir={tmp_path}/run")
    first = logs_of(done, "train")[0]
    assert first["loss/train"] == pytest.approx(0.6931471805599453, abs=1e-12) and first["kl_train/chosen"] == 0
    log = logs_of(sft, "eval")[1 if given == "step-24" else -1]
    assert logs_of(done, "eval")[0]["logps_eval/chosen"] == pytest.approx(log["logps_eval/chosen"], rel=1e-5)
    found, last = measured(done), logs_of(done, "eval")[-1]
    assert found["seqkl/chosen"].mean == pytest.approx(last["kl_eval/chosen"], rel=1e-4)


def test_full_training_from_an_adapter(runs, tmp_path):
    common = [*DATA, "loss=tdpo", f"model.archive={runs['sft']}/step-24/adapter", "n_examples=8", "lr=1e-3", "warmup_steps=0"]
    done = run(*common, f"local_run_dir={tmp_path}/run")
    assert logs_of(done, "train")[0]["loss/train"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert logs_of(done, "eval")[-1]["kl_eval/chosen"] > 1e-3
    trained = torch.load(done / "LATEST" / "policy.pt", weights_only=True)["state"]
    raw = AutoModelForCausalLM.from_pretrained(MINI / "model").state_dict()
    assert all(not torch.equal(trained[name], tensor) for name, tensor in raw.items() if tensor.dim() == 2)  # all weights, no adapters


MOVING = [*DATA, ARCHIVE, "loss=tdpo2", *LORA, "reference.update_every=2", "reference.mixup=1", "n_examples=48", "save_every=8"]
STAGES = [*DATA, ARCHIVE, "loss=sdpo_stepwise", "loss.order=easy_to_hard", "n_epochs=1", "log_kl=true", *LORA, "n_examples=null"]


def matrices_of(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Return the matrices of one of the two adapters in a checkpoint's state, by name."""
    reader = torch.distributed.checkpoint.FileSystemReader(folder / "state")
    metadata = reader.read_metadata().state_dict_metadata
    names = [name for name in metadata if name.startswith("policy.") and f".{kind}." in name]
    state = {name: torch.empty(metadata[name].size) for name in names}
    torch.distributed.checkpoint.load(state, storage_reader=reader, no_dist=True)
    return {name.replace(f".{kind}.", "."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("more", [[], ["model.fsdp_policy_mp=bfloat16"]], ids=["float32", "bfloat16"])
def test_a_reference_that_follows_the_policy_is_a_second_adapter(more, tmp_path):
    """TR-DPO: it is replaced after steps 2, 4 and 6, so that steps 3 and 5 start at loss ln 2 and KL 0; resuming changes nothing."""
    whole = run(*MOVING, *more, f"local_run_dir={tmp_path}/whole")
    logs = logs_of(whole, "train")
    starts = [i for i, log in enumerate(logs) if abs(log["loss/train"] - 0.6931471805599453) < 1e-12 and log["kl_train/chosen"] == 0]
    assert starts == [0, 2, 4] and len(logs) == 6
    assert all(log["kl_train/chosen"] > 1e-6 for log in logs[1::2])
    for step in range(1, 7):
        ours, source = matrices_of(whole / f"step-{8 * step}", "reference"), whole / f"step-{8 * (step - step % 2)}"
        if step > 1:
            assert ours and all(torch.equal(ours[name], tensor) for name, tensor in matrices_of(source, "default").items())
        else:
            assert not any(tensor.any() for name, tensor in ours.items() if ".lora_B." in name)
    stopped = run(*MOVING, *more, "n_examples=24", f"local_run_dir={tmp_path}/run")  # amid two moves
    run(*MOVING, *more, f"resume={stopped}")
    assert_same_run(stopped, whole)
    kept = load_file(whole / "LATEST" / "adapter" / "adapter_model.safetensors")
    assert len(kept) == len(ours) and not [name for name in kept if "reference" in name]


def test_the_second_adapter_is_the_policy_of_that_time(tmp_path):
    """eval.py on the last checkpoint, against the merged adapter of step 24, which became the reference: the run's own eval."""
    done = run(*MOVING, "reference.update_every=3", "n_examples=40", f"local_run_dir={tmp_path}/run")
    adapter = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(done / "base"), done / "step-24" / "adapter")
    adapter.merge_and_unload().save_pretrained(tmp_path / "reference")
    found, log = measured(done, reference=tmp_path / "reference"), logs_of(done, "eval")[-1]
    assert found["seqkl/chosen"].mean == pytest.approx(log["kl_eval/chosen"], rel=1e-4) and log["kl_eval/chosen"] > 1e-3
    assert measured(done)["seqkl/chosen"].mean != pytest.approx(log["kl_eval/chosen"], rel=0.01)  # against the initial one


def test_stages_replace_the_reference(tmp_path):
    """sDPO: 96 pairs in three stages of four batches; policy and reference are equal at the first step of each."""
    logs = logs_of(run(*STAGES, f"local_run_dir={tmp_path}/run"), "train")
    same = [i for i, log in enumerate(logs) if abs(log["loss/train"] - 0.6931471805599453) < 1e-12 and log["kl_train/chosen"] == 0]
    assert same == [0, 4, 8] and len(logs) == 12


@pytest.mark.parametrize("options", [MOVING, STAGES], ids=["moving", "stages"])
def test_a_sharded_second_adapter(options, ranks, tmp_path):
    one = run(*options, f"local_run_dir={tmp_path}/one")
    assert_close_logs(logs_of(one), logs_of(ranks(2).run(*options, *SHARDED, f"local_run_dir={tmp_path}/two")))


@pytest.mark.parametrize(
    "given,message",
    [
        (["adapter.rank=0"], "adapter.rank"),
        (["adapter.rank=4", "trainer=TensorParallelTrainer"], "TensorParallelTrainer does not split adapters; use FSDPTrainer"),
        (["adapter.rank=4", "model.reference_dtype=bfloat16"], "the reference is the policy's own weights"),
        (["adapter.rank=4", "reference.update_every=2"], "a mixture of A and of B gives no mixture of B A; use reference.mixup=1"),
        (["adapter.rank=4", "adapter.init=pissa"], "adapter.init"),
    ],
)
def test_bad_options_end_in_a_line(given, message):
    with pytest.raises(UserError, match=message):
        check_config(compose("exp_name=x", *PREFERENCE, *given))
