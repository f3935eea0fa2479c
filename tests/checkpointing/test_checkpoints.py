"""Checkpoints are written completely or not at all, load without executing anything, and can be used as archives."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import FAMILIES, MINI, compose, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tdpo.checkpointing import checkpoints
from tdpo.checkpointing.checkpoints import damaged_files, holds_a_run, list_checkpoints, save_checkpoint
from tdpo.checkpointing.state_reader import load_tensors
from tdpo.distributed.world import World
from tdpo.models.archive import check_archive, read_archive
from tdpo.models.build import Models, build_model, check_model, load_model_config
from tdpo.models.tokenizer import load_tokenizer
from tdpo.utils import RunError, UserError

STATE = {"weight": torch.arange(6.0).reshape(2, 3)}
FILES = ["manifest.json", "policy.pt", "state"]


def save(run_dir, examples, state=STATE, metrics=None, export=None, with_policy=True):
    progress = {"examples": examples, "eval_metrics": metrics or {}}
    return save_checkpoint(World(), str(run_dir), state if with_policy else None, {"policy": state}, progress, export)


def test_a_checkpoint_has_the_published_format_and_latest_points_to_it(tmp_path):
    save(tmp_path, 8, metrics={"loss/eval": np.float64(0.5)})
    save(tmp_path, 16)
    content = torch.load(tmp_path / "LATEST" / "policy.pt", weights_only=True)
    assert set(content) == {"step_idx", "state", "metrics"} and content["step_idx"] == 16
    assert torch.load(tmp_path / "step-8" / "policy.pt", weights_only=True)["metrics"] == {"loss/eval": 0.5}
    assert os.readlink(tmp_path / "LATEST") == "step-16"  # relative, because the run's folder may be moved
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-16", "step-8"]


@pytest.mark.parametrize("place", ["save", "rename", "export"])
def test_a_failed_save_leaves_the_last_checkpoint(place, tmp_path, monkeypatch):
    save(tmp_path, 8)

    def fail(*_, **__):
        raise RuntimeError("unexpected pos 64 vs 0")  # torch's message when the disk is full

    target = {"save": (torch, "save"), "rename": (os, "rename"), "export": (checkpoints, "_sync")}[place]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(RunError, match=r"step-16 could not be written .*the last checkpoint is untouched"):
        save(tmp_path, 16)
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-8"] and os.readlink(tmp_path / "LATEST") == "step-8"


def test_a_failed_export_does_not_cost_the_weights(tmp_path, capsys):
    """Transformers refuses to save some models because of their generation settings."""

    def export(folder):
        os.mkdir(folder)
        raise ValueError("The generation config instance is invalid")

    save(tmp_path, 8, export=export)
    assert sorted(os.listdir(tmp_path / "LATEST")) == FILES and "no Hugging Face folder" in capsys.readouterr().out


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(RunError, match="too little space; .* MB needed, 0.0 MB free"):
        save(tmp_path, 8)
    assert os.listdir(tmp_path) == []


def test_a_stale_temporary_folder_is_replaced_but_never_a_checkpoint(tmp_path):
    (tmp_path / "step-8.tmp").mkdir()
    (tmp_path / "step-8.tmp" / "rest").touch()
    save(tmp_path, 8)
    assert sorted(os.listdir(tmp_path / "step-8")) == FILES
    with pytest.raises(RunError, match="never overwritten"):
        save(tmp_path, 8)


def test_a_latest_folder_of_the_published_code_is_left_alone(tmp_path):
    (tmp_path / "LATEST").mkdir()
    with pytest.raises(RunError, match="LATEST is a folder"):
        save(tmp_path, 8)
    assert os.listdir(tmp_path) == ["LATEST"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it-was-run",)


@pytest.mark.parametrize("content", [{"step_idx": 0, "state": {"weight": Malicious()}, "metrics": {}}, {"state_dict": {}}, [1]])
def test_code_in_an_archive_is_never_executed(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "policy.pt")
    with pytest.raises(UserError, match="is not a policy.pt"):
        read_archive("policy.pt")
    with open("raw.pt", "wb") as file:
        pickle.dump(content, file)
    with pytest.raises(UserError, match="is not a policy.pt"):
        read_archive("raw.pt")
    assert sorted(os.listdir(tmp_path)) == ["policy.pt", "raw.pt"]


@pytest.mark.parametrize("where", ["index", "item"])
def test_code_in_a_state_is_never_executed(where, tmp_path, monkeypatch):
    """The index of a distributed checkpoint is a pickle, and its items may be pickled too."""
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path, 8)
    if where == "index":
        with open(f"{folder}/state/.metadata", "wb") as file:
            pickle.dump(Malicious(), file)
    else:
        shutil.rmtree(f"{folder}/state")
        dcp.save({"policy": {"weight": Malicious()}}, checkpoint_id=f"{folder}/state", no_dist=True)
    with pytest.raises(RunError, match="not loaded|does not fit"):
        load_tensors(World(), folder, {"policy": {"weight": torch.zeros(2, 3)}})
    assert not os.path.exists("it-was-run")


@pytest.mark.parametrize("tensor", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64)], ids=["shape", "dtype"])
def test_a_state_that_does_not_fit_is_not_cast(tensor, tmp_path):
    folder = save(tmp_path, 8)
    with pytest.raises(RunError, match="does not fit this run: .*: policy.weight"):
        load_tensors(World(), folder, {"policy": {"weight": tensor}})
    with pytest.raises(RunError, match="does not fit this run: .*: policy.weight"):
        load_tensors(World(), folder, {"policy": {}})
    found = {"policy": {"weight": torch.zeros(2, 3)}}
    load_tensors(World(), folder, found)
    assert torch.equal(found["policy"]["weight"], STATE["weight"])


def test_buffers_in_archives_of_2023_are_ignored(tmp_path):
    state = torch.load(MINI / "sft_policy.pt", weights_only=True)["state"]
    old = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention."
        old |= {prefix + "bias": torch.ones(1), prefix + "masked_bias": torch.ones(1), prefix + "rotary_emb.inv_freq": torch.ones(4)}
    torch.save({"step_idx": 1, "state": old, "metrics": {}}, tmp_path / "policy.pt")
    read = read_archive(str(tmp_path / "policy.pt"))
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_every_family_are_read_back(family, tmp_path):
    """Some names look like those of ignored buffers, for example GPT-2's attn.c_attn.bias."""
    state = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).state_dict()
    save(tmp_path, 8, state)
    read = read_archive(str(tmp_path / "LATEST" / "policy.pt"))
    assert read.keys() == state.keys() and all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_an_archive_that_does_not_fit_names_the_keys():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    state = model.state_dict()
    del state["lm_head.weight"]  # tied: it may be missing
    check_archive("a.pt", state, model)
    state["more.weight"] = state.pop("transformer.ln_f.bias")
    state["transformer.ln_f.weight"] = torch.zeros(9)
    with pytest.raises(UserError) as error:
        check_archive("a.pt", state, model)
    for part in (
        "missing: transformer.ln_f.bias",
        "not in the model: more.weight",
        "other shape: transformer.ln_f.weight (9,) (model: (8,))",
    ):
        assert part in str(error.value)


def model_of(*overrides: str):
    config = compose("exp_name=x", "model=blank_model", f"model.name_or_path={MINI}/model", *overrides).model
    tokenizer = load_tokenizer(config, None)
    model_config = load_model_config(config, tokenizer, None)
    return build_model(config, model_config, torch.float32, None, check_model(config, model_config, tokenizer, 64))


def test_policy_file_and_hugging_face_folder_hold_the_same_weights(tmp_path):
    """Transformers loads hf/, and models that are built from policy.pt or from hf/ as archive have the same weights."""
    data = ["datasets=[hh]", f"datasets.hh.path={MINI}/data", "max_length=64", "max_prompt_length=32", "batch_size=8", "n_examples=16"]
    run_dir = run("model=blank_model", f"model.name_or_path={MINI}/model", *data, "lr=1e-3", f"local_run_dir={tmp_path}/run")
    policy = torch.load(run_dir / "LATEST" / "policy.pt", weights_only=True)
    assert "metrics" in policy and policy["step_idx"] == 16 and set(policy["metrics"]) == {"loss/eval", "logps_eval/chosen"}
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST" / "hf", dtype=torch.float32).state_dict()
    assert exported.keys() == policy["state"].keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in policy["state"].items())
    assert AutoTokenizer.from_pretrained(run_dir / "LATEST" / "hf")("wind help")["input_ids"]
    start = AutoModelForCausalLM.from_pretrained(MINI / "model").state_dict()
    assert not torch.equal(exported["lm_head.weight"], start["lm_head.weight"])
    for archive in ("policy.pt", "hf"):
        loaded = model_of(f"model.archive={run_dir}/LATEST/{archive}").state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in exported.items())
    assert os.listdir(run_dir / "step-16") and holds_a_run(str(run_dir))


def test_models_of_one_archive_share_no_memory():
    """Training the policy must change neither the reference nor the archive."""
    options = ["model=blank_model", f"model.name_or_path={MINI}/model", f"model.archive={MINI}/sft_policy.pt"]
    config = compose("exp_name=x", *options).model
    tokenizer = load_tokenizer(config, None)
    model_config = load_model_config(config, tokenizer, None)
    archive = check_model(config, model_config, tokenizer, 64)
    models = Models(config, model_config, None, archive, needs_reference=True, max_length=64)
    policy, reference = models.policy(), models.reference()
    saved = torch.load(MINI / "sft_policy.pt", weights_only=True)["state"]
    for parameter in policy.parameters():
        torch.nn.init.ones_(parameter)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in reference.state_dict().items())
    assert all(torch.equal(archive[name], tensor) for name, tensor in saved.items())
    tiny = compose("exp_name=x").model  # random weights: drawn once, for both models
    tokenizer = load_tokenizer(tiny, None)
    models = Models(tiny, load_model_config(tiny, tokenizer, None), None, None, needs_reference=True, max_length=64)
    policy, reference = models.policy(), models.reference()
    for (name, a), b in zip(policy.state_dict().items(), reference.state_dict().values()):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), name


def test_a_hugging_face_folder_of_another_family_is_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="do not fit the model: missing: gpt_neox"):
        model_of(f"model.archive={tmp_path}/other")


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("intermediate_size", 48, "other shape: .*gpt_neox.layers.0.mlp.dense_4h_to_h.weight"),
        ("num_hidden_layers", 3, "not in the model: gpt_neox.layers.2"),
        ("num_hidden_layers", 1, "missing: gpt_neox.layers.1"),
    ],
)
def test_a_hugging_face_folder_of_other_sizes_names_the_keys(field, value, message, tmp_path):
    config = AutoConfig.from_pretrained(MINI / "model")
    setattr(config, field, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"do not fit the model: {message}"):
        model_of(f"model.archive={tmp_path}/other")


@pytest.mark.parametrize("save_policy", ["always", "never"])
def test_an_archive_may_be_a_run_a_checkpoint_or_its_policy(save_policy, tmp_path):
    """Without policy.pt the weights are read from state/."""
    expected = {name: tensor + 1 for name, tensor in model_of().state_dict().items()}
    save(tmp_path, 8, expected, with_policy=save_policy == "always")
    given = [tmp_path, tmp_path / "step-8", tmp_path / "LATEST"] + [tmp_path / "LATEST" / "policy.pt"] * (save_policy == "always")
    for path in given:
        found = model_of(f"model.archive={path}").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_missing_policy_file_names_the_folder_to_give(tmp_path):
    save(tmp_path, 8, with_policy=False)
    with pytest.raises(UserError, match=f"policy.pt does not exist: .*give {tmp_path}/LATEST$"):
        read_archive(f"{tmp_path}/LATEST/policy.pt")
    save(tmp_path, 16)
    (tmp_path / "step-16" / "policy.pt").unlink()  # this one was saved with it, so its folder would be refused too
    with pytest.raises(UserError, match="step-16/policy.pt does not exist$"):
        read_archive(f"{tmp_path}/step-16/policy.pt")


def test_a_folder_with_a_run_is_refused_and_untouched(tmp_path, command):
    (tmp_path / "metrics.jsonl").write_text("kept\n")
    code, _, err = command("exp_name=x", f"local_run_dir={tmp_path}")
    assert code == 2 and "already holds a run" in err
    assert os.listdir(tmp_path) == ["metrics.jsonl"] and (tmp_path / "metrics.jsonl").read_text() == "kept\n"


def rewrite(folder, change) -> None:
    """Change the manifest of a checkpoint."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "manifest.json").write_text(json.dumps({"files": change(files)}))


UNLISTED = {
    "policy.pt": lambda files: {name: entry for name, entry in files.items() if name != "policy.pt"},
    "state/__0_0.distcp": lambda files: {name: entry for name, entry in files.items() if not name.endswith(".distcp")},
}


@pytest.mark.parametrize("file", UNLISTED)
def test_a_manifest_that_lists_less_than_there_is_is_no_manifest(file, tmp_path):
    save(tmp_path, 8)
    rewrite(tmp_path / "step-8", UNLISTED[file])
    assert damaged_files(World(), str(tmp_path / "step-8")) == [file]
    if file == "state/__0_0.distcp":
        (tmp_path / "step-8" / "policy.pt").unlink()
        rewrite(tmp_path / "step-8", UNLISTED["policy.pt"])
    with pytest.raises(UserError, match="is damaged|is not what its run saved"):
        read_archive(f"{tmp_path}/step-8")


def test_shards_that_only_the_index_names_must_be_listed_too(tmp_path):
    save(tmp_path, 8)
    rewrite(tmp_path / "step-8", UNLISTED["state/__0_0.distcp"])
    (tmp_path / "step-8" / "state" / "__0_0.distcp").unlink()
    assert damaged_files(World(), str(tmp_path / "step-8")) == ["state/__0_0.distcp"]


MANIFESTS = {
    "outside": lambda files: {**files, "../../secret": {"size": 0, "sha256": ""}},
    "absolute": lambda files: {**files, "/etc/hostname": {"size": 0, "sha256": ""}},
    "list": list,
    "no progress": lambda files: {name: entry for name, entry in files.items() if "progress" not in name},
    "nothing": lambda files: {},
    "no entry": lambda files: {**files, "state/.metadata": None},
    "number": lambda files: {**files, "state/.metadata": 3},
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_of_another_kind_is_no_manifest(kind, tmp_path):
    save(tmp_path, 8)
    rewrite(tmp_path / "step-8", MANIFESTS[kind])
    assert damaged_files(World(), str(tmp_path / "step-8")) == ["manifest.json"]


def test_a_missing_file_with_an_entry_of_null_is_damage(tmp_path):
    save(tmp_path, 8)
    rewrite(tmp_path / "step-8", lambda files: {**files, "state/more": None, "policy.pt": None})
    assert damaged_files(World(), str(tmp_path / "step-8")) == ["manifest.json"]


def test_names_that_only_look_like_checkpoints_are_no_checkpoints(tmp_path):
    save(tmp_path, 8)
    for name in ("step-²", "step-٣", "step-", "step-x", "step--1", "step-1.5", "step-8.old", "step-16"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-24").touch()
    (tmp_path / "step-32").mkdir()
    os.mkfifo(tmp_path / "step-32" / "manifest.json")
    assert list_checkpoints(str(tmp_path)) == [str(tmp_path / "step-8")]


def test_a_folder_that_is_no_checkpoint_is_set_aside_when_its_name_is_needed(tmp_path):
    (tmp_path / "step-8" / "manifest.json").mkdir(parents=True)
    save(tmp_path, 8)
    assert list_checkpoints(str(tmp_path)) == [str(tmp_path / "step-8")] and (tmp_path / "step-8.old" / "manifest.json").is_dir()


@pytest.mark.parametrize("name", ["LATEST.tmp", "step-8.tmp"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_temporary_names_of_the_wrong_kind_are_in_nobodys_way(name, kind, tmp_path):
    path = tmp_path / name
    {"file": path.touch, "folder": lambda: (path / "a").mkdir(parents=True), "link": lambda: path.symlink_to("nowhere")}[kind]()
    save(tmp_path, 8)
    assert os.readlink(tmp_path / "LATEST") == "step-8" and damaged_files(World(), str(tmp_path / "step-8")) == []
    assert not os.path.lexists(path)


@pytest.mark.parametrize("where", ["state", "policy"])
def test_a_second_ctrl_c_during_a_save_is_one(where, tmp_path, monkeypatch):
    """PyTorch wraps it in an error of its own."""
    save(tmp_path, 8)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    target = {"state": (checkpoints.dcp.FileSystemWriter, "write_data"), "policy": (torch, "save")}[where]
    monkeypatch.setattr(*target, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 16)
    assert sorted(os.listdir(tmp_path)) == ["LATEST", "step-8"]


def test_a_policy_file_with_another_hash_is_refused(tmp_path):
    """By everything that reads weights; a copy elsewhere has no hash beside it."""
    save(tmp_path, 8)
    shutil.copy(tmp_path / "step-8" / "policy.pt", tmp_path / "copy.pt")
    torch.save({"step_idx": 8, "state": {"weight": torch.zeros(2, 3)}, "metrics": {}}, tmp_path / "step-8" / "policy.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "LATEST" / "policy.pt")
    for path in (tmp_path, tmp_path / "step-8", tmp_path / "LATEST" / "policy.pt", tmp_path / "link.pt"):
        with pytest.raises(UserError, match="is not what its run saved"):
            read_archive(str(path))
    assert torch.equal(read_archive(str(tmp_path / "copy.pt"))["weight"], STATE["weight"])


@pytest.mark.parametrize(
    "tensor,message",
    [
        (torch.ones(2, 3, dtype=torch.int64), "not floating-point numbers: weight int64"),
        (torch.ones(2, 3, dtype=torch.bool), "not floating-point numbers: weight bool"),
        (torch.ones(2, 3, dtype=torch.complex64), "not floating-point numbers: weight complex64"),
        (torch.ones(2, 3).to_sparse(), "not floating-point numbers: weight float32 sparse"),
    ],
)
def test_an_archive_of_other_numbers_is_refused(tensor, message):
    with pytest.raises(UserError, match=message):
        check_archive("a.pt", {"weight": tensor}, torch.nn.Linear(3, 2, bias=False))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        check_archive("a.pt", {"weight": torch.ones(2, 3, dtype=dtype)}, torch.nn.Linear(3, 2, bias=False))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = model_of().state_dict()
    state["gpt_neox.final_layer_norm.bias"] = torch.full_like(state["gpt_neox.final_layer_norm.bias"], float("nan"))
    torch.save({"step_idx": 8, "state": state, "metrics": {}}, tmp_path / "policy.pt")
    with pytest.raises(UserError, match="policy.pt' are not finite in float32 .gpt_neox.final_layer_norm.bias"):
        model_of(f"model.archive={tmp_path}/policy.pt")


def test_others_may_read_what_a_run_has_written(tmp_path):
    before = os.umask(0o022)
    try:
        run_dir = run("loss=sft", "batch_size=8", "n_examples=8", "n_eval_examples=8", f"local_run_dir={tmp_path}/run")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in run_dir.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o644} and {m for p, m in modes.items() if p.is_dir()} == {0o755}
