"""QLoRA: a policy with quantised weights is the model of the dequantised ones, exactly, whatever the batch and the pass."""

import importlib.util
import math

import pytest
import torch
from helpers import padded, token_pairs
from lora import assert_same_step, draw_b
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tdpo.cli.schema import Config
from tdpo.losses import get_objective
from tdpo.models.adapters import OwnReference, attach, merged
from tdpo.models.build import empty_model
from tdpo.models.memory import ModelShape
from tdpo.models.quantized import check_quantize, described, emptied, loading_options, quantized, quantized_layers, settled
from tdpo.scoring.prefix_sharing import shared_prefix_batch
from tdpo.scoring.scorer import Scorer
from tdpo.utils import UserError
from tdpo.weights import is_quantized, parameter_count, plain_weights, without_adapters

METHODS = ["nf4", "int8"]
SIZES = {"vocab_size": 31, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
MODELS = {
    "gpt2": {"vocab_size": 31, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {**SIZES, "max_position_embeddings": 64},
    "llama": {**SIZES, "num_key_value_heads": 1},
    "mixtral": {**SIZES, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
}
LOSSES = {"tdpo2": {"beta": 0.5, "alpha": 0.5}, "sft": {}, "dpo": {"beta": 0.5}}
ADAPTER = OmegaConf.create({"rank": 3, "alpha": 5.0, "targets": "all-linear", "rslora": False, "init": "uniform"})


def built(family: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **MODELS[family], bos_token_id=0, eos_token_id=0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()


def packed(family: str, method: str, dtype: torch.dtype = torch.float32):
    return quantized(built(family, dtype), method, dtype).eval().requires_grad_(False)


def with_adapters(family: str, method: str, dtype: torch.dtype = torch.float32):
    """Return a quantised model whose adapters change it: B is drawn, not 0."""
    model = packed(family, method, dtype)
    attach(model, ADAPTER, dtype, seed=1)
    return draw_b(model)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scoring", ["fast", "plain"])
def test_loss_and_gradients_are_those_of_the_dequantised_weights(family, loss, scoring):
    """Relative to each gradient's norm; the oracle has W + s B A with dequantised W, and no adapters."""
    objective = get_objective(loss, **LOSSES[loss])
    model = with_adapters(family, "nf4")
    whole, base = built(family, torch.float32), built(family, torch.float32)
    state = dict(plain_weights(model))
    whole.load_state_dict(merged(model, state)), base.load_state_dict(without_adapters(state))
    assert_same_step(model, whole, base, objective, scoring, scale=5 / 3, tolerance=1e-5, least=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_starts_at_the_reference_exactly(method, dtype):
    model = packed("llama", method, dtype)
    attach(model, ADAPTER, torch.float32 if dtype == torch.float32 else dtype, seed=0)
    scorer = Scorer(model, OwnReference(model), get_objective("tdpo2", alpha=0.5, beta=0.5))
    for batch in (shared_prefix_batch(token_pairs()), padded(token_pairs())):
        scored = scorer(batch)
        assert (scored.output.losses - math.log(2)).abs().max() < 1e-15
        for score in scored.scores.values():
            assert torch.equal(score.logps, score.reference_logps) and not score.kl.any()
        scored.loss.backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(method):
    """Not even if what enters a layer has outliers, which the usual threshold of int8 would treat by columns of the whole batch."""
    whole = built("llama")
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.input_layernorm.weight.mul_(3), layer.post_attention_layernorm.weight.mul_(3)
            for name, parameter in layer.named_parameters():
                parameter.mul_(8 if "_proj" in name else 1)
        whole.lm_head.weight.mul_(30)
    model = quantized(whole, method, torch.float32).eval()
    torch.manual_seed(0)
    ids = torch.randint(31, (4, 12))
    with torch.no_grad():
        together, alone = model(ids).logits[:1], model(ids[:1]).logits
    assert (together - alone).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_files_and_models_in_memory_are_quantised_alike(method, family, tmp_path):
    built(family, torch.float32).save_pretrained(tmp_path)
    more = {"dtype": torch.float32, "experts_implementation": "eager"}
    ours = dict(plain_weights(packed(family, method)))
    read = settled(AutoModelForCausalLM.from_pretrained(tmp_path, **more, **loading_options(built(family), method, torch.float32)))
    theirs = dict(plain_weights(read))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_dequantised_weights_have_the_names_and_shapes_of_the_plain_model(family, method):
    """Rounded by at most half the largest distance of two neighbouring numbers: 0.15 of a block's largest in NF4, 1 / 254 of a row's."""
    original = built(family)
    before = original.state_dict()
    model = packed(family, method)
    after = dict(plain_weights(model))
    assert after.keys() == before.keys()
    names = {f"{name}.weight" for name, layer in model.named_modules() if layer in set(quantized_layers(model))}
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape and after[name].dtype == tensor.dtype
        if name not in names:
            assert torch.equal(after[name], tensor)
            continue
        assert not torch.equal(after[name], tensor)
        # Blocks and rows are as bitsandbytes sees them: (out, in).
        error, whole = (x.t() if isinstance(original.get_submodule(name[:-7]), Conv1D) else x for x in (after[name] - tensor, tensor))
        parts = (-1, 64) if method == "nf4" else whole.shape
        error, largest = (x.reshape(parts).abs().amax(1) for x in (error, whole))
        assert (error / largest).max() <= (0.165 if method == "nf4" else 0.55 / 127)
    assert parameter_count(model) == parameter_count(built(family, torch.float32))


def test_what_is_quantised_is_known_before_weights_are_loaded():
    """Linear layers; not embeddings, norms, head, or a mixture's experts."""
    for family in MODELS:
        loaded = packed(family, "nf4")
        empty = emptied(empty_model(built(family).config), "nf4", torch.float32)
        names = [{name for name, layer in model.named_modules() if layer in set(quantized_layers(model))} for model in (loaded, empty)]
        assert names[0] == names[1] and not [name for name in names[0] if "head" in name or "embed" in name or "experts" in name]
        assert "in nf4; policy.pt, hf/ and base/ hold them dequantised" in described(empty, "nf4")
    llama = emptied(empty_model(built("llama").config), "int8", torch.float32)
    whole, ends = parameter_count(built("llama")), 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    assert described(llama, "int8").startswith(f"quantize: {(whole - ends - 5 * 64) / whole:.0%} of the parameters")


def test_widths_that_nf4_cannot_have_are_left_out():
    sizes = {**MODELS["llama"], "intermediate_size": 80}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    names = {name for name, layer in quantized(model, "nf4", torch.float32).named_modules() if is_quantized(layer)}
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    narrow = AutoConfig.for_model("llama", **{**MODELS["llama"], "hidden_size": 48, "intermediate_size": 80})
    with pytest.raises(UserError, match="LlamaForCausalLM has no linear layer that can be quantised"):
        described(emptied(empty_model(narrow), "nf4", torch.float32), "nf4")
    assert "quantize: 92%" in described(emptied(empty_model(narrow), "int8", torch.float32), "int8")


@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_quantised_weights_are_known_before_they_are_loaded(method):
    config = AutoConfig.for_model("llama", **{**MODELS["llama"], "hidden_size": 256, "intermediate_size": 1024})
    shape = ModelShape.of_model(emptied(empty_model(config), method, torch.float32))
    model = quantized(AutoModelForCausalLM.from_config(config), method, torch.float32)
    layers = [f"{name}." for name, layer in model.named_modules() if is_quantized(layer)]
    kept = [tensor for name, tensor in model.state_dict().items() if name.startswith(tuple(layers))]
    assert shape.quantized_bytes == pytest.approx(sum(tensor.numel() * tensor.element_size() for tensor in kept), rel=0.02)
    assert (
        shape.quantized == sum(p.numel() for p in empty_model(config).parameters()) - 2 * 31 * 256 - 5 * 256 and shape.matrix == 256 * 1024
    )


@pytest.mark.parametrize("method", METHODS)
def test_passes_with_and_without_gradient_agree(method):
    """Some CPUs repack weights when no gradient is needed, into a form through which none flows."""
    model, fresh = with_adapters("llama", method), with_adapters("llama", method)
    ids = torch.randint(31, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
    after = model(ids).logits
    assert torch.equal(after, before)
    after.square().sum().backward(), fresh(ids).logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    own = dict(model.named_parameters())
    assert gradients and all(torch.equal(own[name].grad, gradient) for name, gradient in gradients.items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_libraries_are_named_where_they_are_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more))
    with pytest.raises(UserError, match="model.quantize needs bitsandbytes: pip install bitsandbytes"):
        check_quantize()


def test_the_schema_knows_the_methods():
    assert set(Config.model_fields["model"].annotation.model_fields["quantize"].annotation.__args__[0].__args__) == set(METHODS)
