"""Rotary positions that are scaled by the length of a text: the same in every forward pass, however a batch is cut."""

import pytest
import torch
from helpers import bpe_tokenizer, logs_of, run, turn, write_lines
from transformers import AutoConfig, AutoModelForCausalLM

from tdpo.models.build import check_model
from tdpo.models.positions import hold_scaling, most_positions, scaling_by_length
from tdpo.utils import UserError

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
MODELS = {
    "dynamic": ("llama", {**SIZES, "max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    "longrope": ("phi3", {**SIZES, "max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": LONG}),
    "longrope, scaled twice": (
        "phimoe",
        {
            **SIZES,
            "max_position_embeddings": 64,
            "num_local_experts": 4,
            "rope_parameters": {**LONG, "short_mscale": 1.1, "long_mscale": 1.5},
        },
    ),
    "dynamic in one kind of layer": (
        "gemma3_text",
        {
            **SIZES,
            "head_dim": 8,
            "max_position_embeddings": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
    ),
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def built(case: str, vocabulary: int = 64):
    family, fields = MODELS[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=vocabulary, **IDS, **fields)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # large enough for positions to matter
    return model


@torch.no_grad()
def difference(model) -> float:
    """How much the logits of ten tokens depend on a text of forty beside them."""
    short, long = torch.randint(64, (1, 10)), torch.randint(64, (1, 40))
    both = torch.cat([torch.nn.functional.pad(short, (0, 30)), long])
    mask = torch.ones_like(both)
    mask[0, 10:] = 0
    alone = model(input_ids=short, use_cache=False).logits
    return (model(input_ids=both, attention_mask=mask, use_cache=False).logits[0, :10] - alone).abs().max().item()


@pytest.mark.parametrize("case", MODELS)
def test_logits_do_not_depend_on_the_other_texts(case):
    model = built(case)
    assert difference(model) > 5e-3  # as Transformers computes
    hold_scaling(model, 64)
    assert difference(model) < 1e-4
    assert scaling_by_length(model.config, 64) in ("dynamic", "longrope") and scaling_by_length(model.config, 16) is None


@pytest.mark.parametrize("case", MODELS)
def test_a_held_model_computes_the_longest_text_as_before(case):
    model, ids = built(case), torch.randint(64, (1, 64))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        model = built(case)
        hold_scaling(model, 64)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        torch.testing.assert_close(model(input_ids=ids[:, :40], use_cache=False).logits, expected[:, :40], rtol=1e-4, atol=1e-4)


def test_a_held_model_generates_what_it_scores():
    """With the cache, one new position at a time. Not of Phi 3, whose own class drops its cache where the factors would change."""
    model = built("dynamic")
    hold_scaling(model, 64)
    ids = torch.randint(3, 64, (1, 10))
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(model(input_ids=out, use_cache=False).logits[0, 9:-1].argmax(-1), out[0, 10:])


def test_scaling_that_does_not_depend_on_the_length_is_left_alone():
    for rope in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}):
        config = AutoConfig.for_model("llama", vocab_size=64, **IDS, **SIZES, rope_parameters={**rope, "rope_theta": 1e4})
        model = AutoModelForCausalLM.from_config(config)
        hold_scaling(model, 2048)
        assert scaling_by_length(config, 10**6) is None and most_positions(config) == config.max_position_embeddings
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("case", ["dynamic", "longrope"])
def test_a_run_does_not_depend_on_the_cut(case, tmp_path, capsys):
    """Responses of 10 to 50 tokens, four or one at a time, scored fast or plain; dynamic scaling goes beyond the model's own positions."""
    tokenizer = bpe_tokenizer()
    built(case, len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": [turn("user", "a")], "chosen": "12" * (1 + 3 * i), "rejected": "no"} for i in range(8)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    options = ["model=blank_model", f"model.name_or_path={tmp_path}/base", "datasets=[jsonl]", f"datasets.jsonl.path={path}"]
    options += [f"datasets.jsonl.eval_path={path}", "loss=tdpo2", "batch_size=4", "n_examples=8", "lr=1e-3", "warmup_steps=0"]
    options += ["max_length=60", "max_prompt_length=30", "n_eval_examples=4"]
    cuts = {"whole": [], "one": ["gradient_accumulation_steps=4"], "plain": ["gradient_accumulation_steps=4", "scoring=plain"]}
    logs = [logs_of(run(*options, *more, f"local_run_dir={tmp_path}/{name}"), "train") for name, more in cuts.items()]
    assert f"positions: {case} scaling as for max_length=60 tokens" in capsys.readouterr().out
    for other in logs[1:]:
        for mine, theirs in zip(logs[0], other, strict=True):
            assert mine["loss/train"] == pytest.approx(theirs["loss/train"], rel=1e-4, abs=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_the_most_positions_of_a_model():
    tokenizer, config = bpe_tokenizer(), built("dynamic", 512).config
    check_model(_none(), config, tokenizer, 64)
    with pytest.raises(UserError, match="max_length=65 exceeds the model's 64 positions"):
        check_model(_none(), config, tokenizer, 65)


def _none():
    """The part of a config's `model` that `check_model` reads, without an archive."""
    from omegaconf import OmegaConf

    return OmegaConf.create({"archive": None})
