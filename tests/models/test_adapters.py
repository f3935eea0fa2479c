"""LoRA: a policy with adapters is the model whose weights are W + s B A, and its reference is the model without them."""

import importlib.util
import json
import math

import peft
import pytest
import torch
from helpers import FAMILIES, SIZES, padded, token_pairs
from lora import assert_same_step, draw_b
from omegaconf import OmegaConf
from small_models import small_config
from transformers import AutoConfig, AutoModelForCausalLM

from tdpo.losses import get_objective
from tdpo.models.adapters import OwnReference, attach, check_peft, merge_folder, merged, off, save_adapter
from tdpo.models.build import base_archive
from tdpo.scoring.prefix_sharing import shared_prefix_batch
from tdpo.scoring.scorer import Scorer
from tdpo.utils import UserError
from tdpo.weights import is_adapter_name, without_adapters

MODELS = {name: FAMILIES[name] for name in ("gpt2", "gpt_neox", "llama")}
MODELS["mixtral"] = {**SIZES, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
LOSSES = {"tdpo2": {"beta": 0.5, "alpha": 0.5}, "sft": {}, "dpo": {"beta": 0.5}}


def options(**changed):
    return OmegaConf.create({"rank": 3, "alpha": 5.0, "targets": "all-linear", "rslora": False, "init": "uniform", **changed})


def built(family: str, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **MODELS[family], bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()  # others lack float64


def with_adapters(family: str, dtype: torch.dtype = torch.float64, **changed):
    """Return a model whose adapters change it: B is drawn, not 0."""
    model = built(family, dtype)
    attach(model, options(**changed), dtype, seed=1)
    return draw_b(model)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scoring", ["fast", "plain"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-5)])  # measured: 1e-5 to 2e-5, by processor
@pytest.mark.parametrize("rslora", [False, True])
def test_loss_and_gradients_are_those_of_the_merged_model(family, loss, scoring, dtype, tolerance, rslora):
    """With G = dL/dW of the model with weights W + s B A: dL/dB = s G A^T and dL/dA = s B^T G. Relative to each gradient's norm."""
    objective = get_objective(loss, **LOSSES[loss])
    model = with_adapters(family, dtype, rslora=rslora)
    whole, base = built(family, dtype), built(family, dtype)
    whole.load_state_dict(merged(model, model.state_dict()))
    scale = 5.0 / (3**0.5 if rslora else 3)
    assert_same_step(model, whole, base, objective, scoring, scale, tolerance, least=1e-12)
    assert all(p.grad is None for name, p in model.named_parameters() if not is_adapter_name(name))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_starts_at_the_reference_exactly(family, dtype):
    """Loss ln 2, KL 0 and equal log-probabilities bit for bit, whatever the dtype of weights and adapters."""
    model = built(family, dtype)
    attach(model, options(), dtype, seed=0)
    scorer = Scorer(model, OwnReference(model), get_objective("tdpo2", alpha=0.5, beta=0.5))
    for batch in (shared_prefix_batch(token_pairs()), padded(token_pairs())):
        scored = scorer(batch)
        assert scored.output.losses.dtype == torch.float64 and (scored.output.losses - math.log(2)).abs().max() < 1e-15
        for score in scored.scores.values():
            assert torch.equal(score.logps, score.reference_logps) and not score.kl.any()
        scored.loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_adapters_are_drawn_from_the_seed_in_their_own_dtype():
    def drawn(seed: int, base: torch.dtype, own: torch.dtype, **changed):
        model = built("llama", base)
        torch.manual_seed(seed + 17)  # whatever was drawn before
        state = torch.get_rng_state()
        attach(model, options(**changed), own, seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: tensor for name, tensor in model.state_dict().items() if is_adapter_name(name)}

    first = drawn(0, torch.float32, torch.float32)
    assert all(torch.equal(x, drawn(0, torch.bfloat16, torch.float32)[name]) for name, x in first.items())
    assert not all(torch.equal(x, drawn(1, torch.float32, torch.float32)[name]) for name, x in first.items())
    assert {x.dtype for x in drawn(0, torch.bfloat16, torch.float32).values()} == {torch.float32}
    spread = torch.cat([x.flatten() for name, x in drawn(0, torch.float32, torch.float32, init="gaussian").items() if "lora_A" in name])
    assert spread.std().item() == pytest.approx(1 / 3, rel=0.1)  # 1 / rank


def targets(model, **changed) -> set[str]:
    attach(model, options(**changed), torch.float32, 0)
    return {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}


def test_all_linear_leaves_out_the_head_and_of_mixtures_router_and_experts():
    assert targets(built("gpt2")) == {"c_attn", "c_proj", "c_fc"}
    assert targets(built("gpt_neox")) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    for model_type, expected in (
        ("mixtral", attention),
        ("qwen3_moe", attention),
        ("qwen2_moe", attention),  # without the expert that every token uses, whose layers peft takes for the others'
        ("gpt_oss", attention),
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
    ):
        model = AutoModelForCausalLM.from_config(small_config(model_type))
        line = attach(model, options(), torch.float32, 0)
        layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
        assert {name.rpartition(".")[2] for name in layers} == expected
        assert not [name for name in layers if ".experts" in name or name.endswith((".gate", ".router", "expert_gate"))]
        assert "experts" in line.rpartition("; no adapters on ")[2], line


def test_targets_by_name():
    assert targets(built("llama"), targets=["q_proj", "v_proj"]) == {"q_proj", "v_proj"}
    model = built("llama")
    attach(model, options(targets=["layers.1.self_attn.q_proj"]), torch.float32, 0)
    assert [name for name, module in model.named_modules() if hasattr(module, "lora_A")] == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(UserError, match=r"no linear layer is called q_prj \(did you mean q_proj\?\); there are down_proj, gate_proj"):
        attach(built("llama"), options(targets=["q_prj"]), torch.float32, 0)
    with pytest.raises(UserError, match="lm_head is the head, which may be tied to the embeddings: leave it out"):
        attach(built("llama"), options(targets=["lm_head"]), torch.float32, 0)
    with pytest.raises(UserError, match="up_proj is part of a mixture's router or experts"):
        attach(AutoModelForCausalLM.from_config(small_config("deepseek_v3")), options(targets=["up_proj"]), torch.float32, 0)
    with pytest.raises(UserError, match="no linear layer is called embed_tokens"):
        attach(built("llama"), options(targets=["embed_tokens"]), torch.float32, 0)


@pytest.mark.parametrize("family", MODELS)
def test_merging_and_the_folder_that_peft_loads(family, tmp_path):
    """Off, merged, and loaded by peft on the base: the same logits as those of the weights that they stand for."""
    model, ids = with_adapters(family, torch.float32), torch.randint(31, (2, 12))
    built(family, torch.float32).save_pretrained(tmp_path / "base")
    save_adapter(model, model.state_dict(), str(tmp_path / "base"), str(tmp_path / "adapter"))
    whole = built(family, torch.float32)
    whole.load_state_dict(merged(model, model.state_dict()))
    with torch.no_grad():
        own, base = model(ids).logits, built(family, torch.float32)(ids).logits
        assert (own - base).abs().max() > 1e-3
        with off(model):
            assert torch.equal(model(ids).logits, base)
        torch.testing.assert_close(whole(ids).logits, own, rtol=1e-5, atol=1e-5)
        named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(ids).logits, own, rtol=1e-5, atol=1e-5)
        again = merge_folder(built(family, torch.float32), str(tmp_path / "adapter"))
        torch.testing.assert_close(again(ids).logits, own, rtol=1e-5, atol=1e-5)
        assert type(again) is type(whole) and again.state_dict().keys() == whole.state_dict().keys()
    assert without_adapters(model.state_dict()).keys() == whole.state_dict().keys()


def test_the_reference_generates_without_adapters():
    model, ids = with_adapters("llama", torch.float32), torch.randint(3, 31, (2, 4))
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    expected = built("llama", torch.float32).generate(input_ids=ids, **settings)
    assert torch.equal(OwnReference(model).generate(input_ids=ids, **settings), expected)
    assert not torch.equal(model.generate(input_ids=ids, **settings), expected)


def test_bfloat16_weights_are_merged_before_they_are_rounded():
    model = with_adapters("llama", torch.bfloat16)
    exact = {name: x.double() for name, x in model.state_dict().items()}
    name = "model.layers.0.self_attn.q_proj"
    a, b, w = (exact[f"{name}.{part}.weight"] for part in ("lora_A.default", "lora_B.default", "base_layer"))
    assert torch.equal(merged(model, model.state_dict())[f"{name}.weight"], (w + 5.0 / 3 * b @ a).bfloat16())


def test_an_adapter_of_another_model_is_refused(tmp_path):
    model = with_adapters("llama", torch.float32)
    save_adapter(model, model.state_dict(), "owner/other", str(tmp_path / "adapter"))
    node = {"archive": str(tmp_path / "adapter"), "name_or_path": "owner/name"}
    with pytest.raises(UserError, match="is an adapter of owner/other, not of owner/name: give model.name_or_path=owner/other; if it was"):
        base_archive(OmegaConf.create(node))
    assert base_archive(OmegaConf.create({**node, "name_or_path": "owner/other"})) is None
    with pytest.raises(UserError, match="adapter cannot be loaded|does not fit the model"):
        merge_folder(built("gpt_neox", torch.float32), str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="adapter_config.json cannot be read"):
        base_archive(OmegaConf.create(node))


def test_peft_is_named_where_it_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    with pytest.raises(UserError, match="need peft: pip install peft accelerate"):
        check_peft()
