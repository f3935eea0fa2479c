"""What a run exports: names, settings and files that other programs load, and export.py."""

import json
import stat
from pathlib import Path

import pytest
import torch
from helpers import FAMILIES, SIZES, bpe_tokenizer, compose, run, turn, weights_of, write_lines
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import export
from tdpo.analysis.trained_models import _base_beside, find_trained
from tdpo.models.build import build_model, check_model, load_model_config
from tdpo.models.export import _add_older_keys, _licence_of, _older_keys, _source, export_policy
from tdpo.models.tokenizer import adds_bos
from tdpo.utils import RunError, UserError

MOE = {"num_key_value_heads": 1, "num_experts_per_tok": 2}
MODELS = {
    "llama": {**FAMILIES["llama"], "rope_theta": 5e5},
    "mixtral": {**SIZES, **MOE, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, **MOE, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "gpt_neox": FAMILIES["gpt_neox"],
}
YOUTU = {**SIZES, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8}
YOUTU |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "tie_word_embeddings": True}


def base_model(folder, family: str, eos: str = "<|endoftext|>"):
    """Save a model with random weights and a chat tokenizer, whose own settings end a text at two tokens."""
    tokenizer = bpe_tokenizer(eos=eos)
    torch.manual_seed(0)
    sizes = {**{**MODELS, "youtu": YOUTU}[family], "vocab_size": len(tokenizer), "max_position_embeddings": 128}
    config = AutoConfig.for_model(family, bos_token_id=1, eos_token_id=tokenizer.eos_token_id, pad_token_id=3, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"eos_token_id": [tokenizer.eos_token_id, 2], "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_text("as SentencePiece has it")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return tokenizer


def arguments(base, folder) -> list[str]:
    rows = [{"prompt": [turn("user", f"2+{i}")], "chosen": "right", "rejected": "wrong"} for i in range(40)]
    data = ["datasets=[jsonl]", f"datasets.jsonl.path={write_lines(folder / 'rows.jsonl', rows)}", "max_length=64", "max_prompt_length=32"]
    return ["model=blank_model", f"model.name_or_path={base}", *data, "n_examples=8", "n_eval_examples=4", "lr=1e-3", "warmup_steps=0"]


def names_of(folder) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.parametrize("family", MODELS)
def test_a_run_from_sft_weights_exports_what_the_base_model_has(family, tmp_path):
    """Names of tensors, generation settings with all ends, files of the tokenizer; also where the run began at policy.pt."""
    tokenizer = base_model(tmp_path / "base", family)
    common = arguments(tmp_path / "base", tmp_path)
    sft = run(*common, "loss=sft", f"local_run_dir={tmp_path}/sft")
    tdpo = run(*common, "loss=tdpo2", f"model.archive={sft}/LATEST/policy.pt", f"local_run_dir={tmp_path}/tdpo")
    for folder in (sft / "LATEST" / "hf", tdpo / "LATEST" / "hf"):
        assert names_of(folder) == names_of(tmp_path / "base")
        settings = GenerationConfig.from_pretrained(folder)
        turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")  # with which responses were trained to end
        assert set(settings.eos_token_id) == {tokenizer.eos_token_id, 2, turn_end} and settings.temperature == 0.6
        assert set(json.loads((folder / "config.json").read_text())["eos_token_id"]) == set(settings.eos_token_id)
        assert (folder / "tokenizer.model").read_text() == "as SentencePiece has it"
        assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {stat.S_IMODE((tmp_path / "rows.jsonl").stat().st_mode)}
        card = (folder / "README.md").read_text()
        assert "license: mit" in card and f"base model: {tmp_path}/base" in card and "| loss/eval |" in card
    state = torch.load(tdpo / "LATEST" / "policy.pt", weights_only=True)["state"]
    loaded = AutoModelForCausalLM.from_pretrained(tdpo / "LATEST" / "hf").state_dict()
    assert all(torch.equal(state[name], loaded[name]) for name in state)


@pytest.mark.parametrize(
    "rope,older",
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
        ),
        (
            {
                "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
        ),
    ],
)
def test_older_keys_of_a_config(rope, older):
    values = {"dtype": "bfloat16", "rope_parameters": rope}
    assert _older_keys(values) == {"torch_dtype": "bfloat16", **older}
    assert _older_keys({**values, "torch_dtype": "float32", "rope_theta": 1.0}) == {k: v for k, v in older.items() if k != "rope_theta"}


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_config_with_older_keys_loads_as_before(family, tmp_path):
    base_model(tmp_path / "base", family)
    done = run(*arguments(tmp_path / "base", tmp_path), "loss=sft", f"local_run_dir={tmp_path}/sft")
    before, after = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "base", done / "LATEST" / "hf"))
    assert after.rope_parameters == before.rope_parameters
    written = json.loads((done / "LATEST" / "hf" / "config.json").read_text())
    assert written["rope_theta"] == before.rope_parameters["rope_theta"] and written["torch_dtype"] == "float32"


def test_export_makes_a_folder_of_any_checkpoint(tmp_path, capsys):
    base_model(tmp_path / "base", "llama")
    command = [*arguments(tmp_path / "base", tmp_path), "loss=sft", f"local_run_dir={tmp_path}/sft", "batch_size=4", "save_every=4"]
    sft = run(*command)

    def call(**options) -> str:
        return export.run(compose(*(f"{key}={value}" for key, value in options.items()), name="export"))

    out = tmp_path / "out"
    call(run=sft / "step-4", out=out, dtype="bfloat16")
    state = torch.load(sft / "step-4" / "policy.pt", weights_only=True)["state"]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(state[name].bfloat16(), tensor) for name, tensor in loaded.state_dict().items())
    assert "4 train examples, 1 updates" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="out=.*/out exists: give the path of a new folder"):
        call(run=sft, out=out)
    with pytest.raises(UserError, match="is a pretrained model, not a run"):
        call(run=out, out=tmp_path / "again")
    assert not (tmp_path / "out.tmp").exists()


def test_the_source_of_settings():
    model = {"name_or_path": "owner/name", "from_config": None, "archive": "policy.pt"}
    assert _source(OmegaConf.create(model)) == "owner/name"
    assert _source(OmegaConf.create({**model, "name_or_path": None, "from_config": {"model_type": "llama"}})) is None


def test_older_keys_change_nothing_that_transformers_reads(tmp_path):
    """Gemma 4 has a kind of scaling that needs a field which the older names lack, and would reject its own config with them."""
    rope = {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = AutoConfig.for_model("gemma4_text", rope_parameters=rope)
    config.save_pretrained(tmp_path)
    _add_older_keys(str(tmp_path / "config.json"), type(config))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_weights_of_an_archive_are_those_of_the_run(tmp_path):
    """Youtu's class sets the embedding of the padding token anew when it is loaded, and then unties it from the head."""
    base = base_model(tmp_path / "base", "youtu")
    assert base.pad_token_id == 3
    common = arguments(tmp_path / "base", tmp_path)
    sft = run(*common, "loss=sft", f"local_run_dir={tmp_path}/sft")
    config = compose(*common, "exp_name=x", f"model.archive={sft}/LATEST/policy.pt").model
    model_config = load_model_config(config, base, None)
    built = build_model(config, model_config, torch.float32, None, check_model(config, model_config, base, 64))
    before, after = weights_of(sft), built.state_dict()
    assert before["lm_head.weight"][3].abs().max() > 0 and built.lm_head.weight is built.model.embed_tokens.weight
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("add_bos", [True, False])
def test_an_exported_tokenizer_begins_texts_as_its_run_did(own, add_bos, tmp_path):
    """Whether the base model's tokenizer adds the beginning of sequence of its own accord, as Llama 3's does, or not."""
    tokenizer = base_model(tmp_path / "base", "llama")
    if own:
        tokenizer.add_bos_token = True
        tokenizer.save_pretrained(tmp_path / "base")
    assert adds_bos(AutoTokenizer.from_pretrained(tmp_path / "base")) == own
    rows = [{"prompt": f"2+{i}", "chosen": " ok", "rejected": " no"} for i in range(40)]
    options = [*arguments(tmp_path / "base", tmp_path), f"datasets.jsonl.path={write_lines(tmp_path / 'texts.jsonl', rows)}"]
    done = run(*options, "loss=sft", f"model.add_bos={str(add_bos).lower()}", f"local_run_dir={tmp_path}/run")
    exported = done / "LATEST" / "hf"
    assert (
        AutoTokenizer.from_pretrained(exported)("ab").input_ids
        == [tokenizer.bos_token_id] * add_bos + tokenizer("ab", add_special_tokens=False).input_ids
    )
    assert find_trained(str(exported)).model.add_bos == find_trained(str(done)).model.add_bos == add_bos


def test_a_model_on_the_hub_can_be_evaluated(tmp_path, monkeypatch):
    """Without a hub only its cache counts, which has no such model."""
    with pytest.raises(UserError, match="run=owner/name: no such folder, and no such model on the Hugging Face hub or in its cache"):
        find_trained("owner/name")
    with pytest.raises(UserError, match="no such folder$"):
        find_trained(str(tmp_path / "none"))
    base_model(tmp_path / "base", "llama")
    monkeypatch.setattr("tdpo.analysis.trained_models.find_file", lambda name, file, cache_dir: str(tmp_path / "base" / file))
    monkeypatch.setattr("tdpo.models.tokenizer.place_of", lambda name: (str(tmp_path / "base"), {}))
    found = find_trained("owner/name")
    assert found.model.name_or_path == "owner/name" and found.config is None


def test_push_uploads_the_folder_to_a_private_repository(tmp_path, monkeypatch, capsys):
    """A failure keeps the folder and is one line."""
    base_model(tmp_path / "base", "llama")
    sft = run(*arguments(tmp_path / "base", tmp_path), "loss=sft", f"local_run_dir={tmp_path}/sft")
    called = []

    class Hub:
        def create_repo(self, repository, private, exist_ok):
            called.append((repository, private, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            if repo_id == "nobody/model":
                raise ConnectionError("no\naccess")
            called.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    out = export.run(compose(f"run={sft}", f"out={tmp_path}/out", "push=me/model", name="export"))
    assert called[0] == ("me/model", True, True)
    assert called[1] == ("me/model", sorted(path.name for path in Path(out).iterdir())) and "README.md" in called[1][1]
    assert "https://huggingface.co/me/model" in capsys.readouterr().out
    with pytest.raises(RunError, match=f"push=nobody/model: no access; the model is in {tmp_path}/again"):
        export.run(compose(f"run={sft}", f"out={tmp_path}/again", "push=nobody/model", name="export"))
    assert (tmp_path / "again" / "config.json").exists()


# --- generation settings ---


@pytest.mark.parametrize(
    "values,expected,said",
    [
        ({"temperature": 0.6, "do_sample": False}, {"temperature": 0.6, "do_sample": True}, ""),  # as Vicuna's and Llama 2's
        ({"temperature": 0.0, "do_sample": False}, {"do_sample": False}, ""),
        ({"length_penalty": 2.0, "early_stopping": True}, {"length_penalty": None}, "length_penalty, early_stopping left out"),
        ({"num_return_sequences": 3}, {"num_return_sequences": None}, "num_return_sequences left out"),
        ({"eos_token_id": "</s>"}, {}, ""),
        ("{", {}, "cannot be read, so its settings are not used"),
    ],
)
def test_odd_generation_settings_are_exported_as_valid_ones(values, expected, said, tmp_path, capsys):
    tokenizer = base_model(tmp_path / "base", "llama")
    (tmp_path / "base" / "generation_config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    config = compose(*arguments(tmp_path / "base", tmp_path), "exp_name=x").model
    plain = AutoModelForCausalLM.from_config(load_model_config(config, tokenizer, None))
    export_policy(plain, tokenizer, str(tmp_path / "out"), plain.state_dict(), config, None, "card")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    settings.validate(strict=True)
    assert {name: getattr(settings, name) for name in expected} == expected
    assert said in capsys.readouterr().out
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    ends |= {tokenizer.convert_tokens_to_ids("</s>")} if "eos_token_id" in values else set()
    assert set(settings.eos_token_id) == ends


def test_a_model_from_an_archive_ends_where_its_base_model_does(tmp_path):
    """Those ends are in generation_config.json alone, which an archive does not have."""
    tokenizer = base_model(tmp_path / "base", "llama")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    torch.save({"step_idx": 0, "state": state, "metrics": {}}, tmp_path / "policy.pt")
    config = compose(*arguments(tmp_path / "base", tmp_path), "exp_name=x", f"model.archive={tmp_path}/policy.pt").model
    model_config = load_model_config(config, tokenizer, None)
    built = build_model(config, model_config, torch.float32, None, check_model(config, model_config, tokenizer, 64))
    assert built.generation_config.eos_token_id == [tokenizer.eos_token_id, 2]


# --- weights ---


def load_with(tmp_path, changed, **options):
    """Build a model whose file holds other tensors: `changed` takes and returns its tensors by name."""
    tokenizer = base_model(tmp_path / "base", "llama")
    path = tmp_path / "base" / "model.safetensors"
    save_file(changed(load_file(path)), path, metadata={"format": "pt"})
    config = compose(*arguments(tmp_path / "base", tmp_path), "exp_name=x").model
    return build_model(config, load_model_config(config, tokenizer, None), options.get("dtype", torch.float32), None, None)


@pytest.mark.parametrize("kind", ["scales", "8 bits"])
def test_quantised_tensors_without_a_word_in_the_config_are_refused(kind, tmp_path):
    def changed(tensors):
        name = "model.layers.0.self_attn.q_proj.weight"
        if kind == "scales":
            return {**tensors, f"{name}_scale": torch.ones(1)}
        return {**tensors, name: tensors[name].to(torch.float8_e4m3fn)}

    with pytest.raises(UserError, match="are quantised .model.layers.0.self_attn.q_proj.weight.*give the model that it was made from"):
        load_with(tmp_path, changed)


def test_integers_that_are_no_weights_do_not_make_a_model_quantised(tmp_path, capsys):
    """Masks of Pythia's files are of 8 bits; other models have scales of their own."""
    name = "model.layers.0.attention.bias"
    load_with(tmp_path, lambda tensors: {**tensors, name: torch.ones(1, 1, 8, 8, dtype=torch.uint8), "vision.logit_scale": torch.ones(1)})
    assert "1 tensors of" in (out := capsys.readouterr().out) and "left out: vision.logit_scale" in out


def test_tensors_that_the_model_lacks_are_counted(tmp_path, capsys):
    load_with(tmp_path, lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
    assert "warning: 1 tensors of" in (out := capsys.readouterr().out) and "left out: model.layers.0.self_attn.q_proj.bias" in out


def test_weights_beyond_the_range_of_float16_are_named(tmp_path):
    def changed(tensors):
        tensors["model.norm.weight"][0] = 1e5
        return tensors

    with pytest.raises(UserError, match="not finite in float16 .model.norm.weight.: they exceed its range: use bfloat16"):
        load_with(tmp_path, changed, dtype=torch.float16)


# --- what a run keeps ---


def test_the_template_of_training_is_kept(tmp_path):
    """Its file may change, or go, after the run."""
    base_model(tmp_path / "base", "llama")
    template = tmp_path / "own.jinja"
    template.write_text("NEW" + bpe_tokenizer().chat_template)
    options = [*arguments(tmp_path / "base", tmp_path), f"model.chat_template={template}", "loss=sft", f"local_run_dir={tmp_path}/sft"]
    sft = run(*options)
    template.write_text("OTHER")
    export.run(compose(f"run={sft}", f"out={tmp_path}/out", name="export"))
    template.unlink()
    export.run(compose(f"run={sft}", f"out={tmp_path}/again", name="export"))
    for folder in (sft / "LATEST" / "hf", tmp_path / "out", tmp_path / "again"):
        assert AutoTokenizer.from_pretrained(folder).chat_template.startswith("NEW{")


def test_a_run_that_is_called_as_a_model_on_the_hub_is_not_taken_for_it(tmp_path):
    checkpoint = tmp_path / "runs" / "mine" / "step-8"
    for folder in (checkpoint, tmp_path / "runs" / "gpt2", tmp_path / "runs" / "Qwen3-0.6B"):
        folder.mkdir(parents=True)
    assert [_base_beside(name, str(checkpoint)) for name in ("gpt2", "Qwen/Qwen3-0.6B")] == ["gpt2", "Qwen/Qwen3-0.6B"]
    (tmp_path / "runs" / "gpt2" / "config.json").write_text("{}")
    assert _base_beside("gpt2", str(checkpoint)) == str(tmp_path / "runs" / "gpt2")  # a model by its relative path


def test_a_base_model_with_a_relative_path_is_found_from_elsewhere(tmp_path, monkeypatch):
    base_model(tmp_path / "base", "llama")
    monkeypatch.chdir(tmp_path)
    sft = run(*arguments("base", tmp_path), "loss=sft", "local_run_dir=runs/sft")
    monkeypatch.chdir("/")
    export.run(compose(f"run={tmp_path / sft}", f"out={tmp_path}/out", name="export"))
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "text,licence",
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense:\n- apache-2.0\n- mit\n---\n", "apache-2.0"),
        ("---\ntitle: a --- b\nlicense : llama3\n---\n", "llama3"),
        ("# hi\n---\nlicense: see: the file\n---\n", None),  # no front matter
        ("---\n: [\n---\n", None),
        ("---\nlicense:\n---\n", None),
    ],
)
def test_the_licence_of_a_model_card(text, licence, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert _licence_of(str(tmp_path), None) == licence
