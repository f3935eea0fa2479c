"""Trials of a model before it is trained."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import DATA, FAMILIES, MINI, compose, run
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tdpo.distributed.world import World
from tdpo.losses import get_objective
from tdpo.models.adapters import OwnReference
from tdpo.models.sampling import _plain_attention, continuations
from tdpo.scoring.probes import check_predictions, fast_scoring_problem, flex_attention_suits, packing_of, packing_problem
from tdpo.scoring.scorer import Scorer
from tdpo.training.compiling import GRAPHS
from tdpo.training.guards import Guards
from tdpo.utils import UserError

BERT = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def scorer_of(family: str, **fields) -> Scorer:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).eval()
    return Scorer(model, None, get_objective("sft"))


@torch.no_grad()
def checked(scorer: Scorer):
    return check_predictions(scorer, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_models_pass(family):
    checked(scorer_of(family, **FAMILIES[family]))


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(UserError, match="BertLMHeadModel is no causal language model.*set that to true"):
        checked(scorer_of("bert", **BERT))
    checked(scorer_of("bert", **BERT, is_decoder=True))


def test_a_model_that_draws_random_numbers_is_named(capsys):
    scorer = scorer_of("llama", **FAMILIES["llama"])
    scorer.policy.lm_head.register_forward_hook(lambda module, args, output: nn.functional.dropout(output, 0.3, training=True))
    checked(scorer)
    assert "warning: LlamaForCausalLM draws random numbers in every forward pass" in capsys.readouterr().out


def test_a_model_that_cannot_compute_is_named():
    scorer = scorer_of("llama", **FAMILIES["llama"])
    scorer.policy.model.norm = nn.LayerNorm(5)
    with pytest.raises(UserError, match="LlamaForCausalLM cannot compute a text of 16 tokens: "):
        checked(scorer)


@pytest.mark.parametrize("scoring", ["auto", "plain"])
def test_a_run_of_an_encoder_ends_in_a_line(scoring, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MINI / "model")
    config = AutoConfig.for_model("bert", **{**BERT, "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="no causal language model"):
        run(*DATA, f"model.name_or_path={tmp_path}/base", f"scoring={scoring}", f"local_run_dir={tmp_path}/run")


# --- FlexAttention, of which PyTorch has no backward pass on CPUs ---

LLAMA = {**FAMILIES["llama"], "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}


@pytest.mark.parametrize("max_length,head,expected", [(1024, 16, True), (1023, 16, False), (4096, 80, False), (4096, 8, False)])
def test_flex_attention_is_for_long_rows_and_heads_of_a_power_of_two(max_length, head, expected):
    config = AutoConfig.for_model("llama", hidden_size=4 * head, num_attention_heads=4, head_dim=head)
    assert flex_attention_suits(config, max_length) == expected


def guards_on_a_gpu(*options) -> Guards:
    """Return the checks of a run whose device is a GPU."""
    config = compose("exp_name=x", "max_length=1024", *options)
    return Guards(
        config, {}, SimpleNamespace(forward_context=nullcontext, sharded=False, compute_dtype=None), World(device=torch.device("cuda"))
    )


def nan_gradient(x: torch.Tensor) -> torch.Tensor:
    """Return zeros whose gradient is NaN."""
    return (x - x.detach()).square().sqrt()


def two_llamas() -> Scorer:
    return Scorer(*(scorer_of("llama", **LLAMA).policy for _ in range(2)), get_objective("tdpo2", beta=0.1))


def eager(monkeypatch, change=lambda output: output) -> None:
    """Compute FlexAttention in plain operations, which have gradients on a CPU too, and change its output."""

    def attention(query, key, value, block_mask, enable_gqa):
        length = query.shape[2]
        steps = torch.arange(length)
        visible = block_mask.mask_mod(0, 0, steps[:, None], steps[None, :])
        return change(F.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=enable_gqa))

    monkeypatch.setattr("tdpo.scoring.probes.torch.compile", lambda function, **_: attention)
    monkeypatch.setattr("tdpo.training.guards.fast_scoring_problem", lambda *_: None)


@pytest.mark.parametrize(
    "change,why",
    [(lambda x: 1.1 * x, "would differ"), (lambda x: x + (x - x.detach()), "would differ"), (lambda x: x + nan_gradient(x), "nan")],
    ids=["output", "gradient", "gradient that is not finite"],
)
def test_attention_with_other_results_is_not_taken(change, why, monkeypatch, caplog):
    eager(monkeypatch, change)
    scorer = two_llamas()
    with caplog.at_level("INFO"):
        guards_on_a_gpu().choose_attention(scorer)
    assert [model.config._attn_implementation for model in (scorer.policy, scorer.reference)] == ["sdpa", "sdpa"]
    assert "attention: sdpa, because with flex_attention: " in caplog.text and why in caplog.text


@pytest.mark.parametrize("error,why", [(RuntimeError("no valid config"), "no valid config"), (torch.OutOfMemoryError(), "memory")])
def test_where_it_cannot_be_compiled_the_model_keeps_its_attention(error, why, monkeypatch, caplog):
    def fail(*_, **__):
        raise error

    eager(monkeypatch, fail)
    scorer = two_llamas()
    with caplog.at_level("INFO"):
        guards_on_a_gpu().choose_attention(scorer)
    assert scorer.policy.config._attn_implementation == "sdpa" and why in caplog.text


def test_where_the_model_differs_with_it_it_is_taken_back(monkeypatch, caplog):
    eager(monkeypatch)
    tried = []

    def other(scorer, _) -> str:
        tried.append(scorer.policy.config._attn_implementation)
        return "its log-probabilities would differ"

    monkeypatch.setattr("tdpo.training.guards.fast_scoring_problem", other)
    scorer = two_llamas()
    guards_on_a_gpu().choose_attention(scorer)
    assert tried == ["flex_attention"] and scorer.policy.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("supports_sdpa", [True, False])
def test_where_it_passes_policy_and_reference_keep_it(supports_sdpa, caplog, monkeypatch):
    """Sampling takes another, also of a reference that is the policy without adapters."""
    eager(monkeypatch)
    scorer = two_llamas()
    with caplog.at_level("INFO"):
        guards_on_a_gpu().choose_attention(scorer)
    assert [model.config._attn_implementation for model in (scorer.policy, scorer.reference)] == ["flex_attention"] * 2
    assert "attention: flex_attention" in caplog.text and torch._dynamo.config.recompile_limit >= GRAPHS
    settings = transformers.GenerationConfig(max_length=5, do_sample=False, pad_token_id=0, eos_token_id=1)
    used = []
    monkeypatch.setattr(type(scorer.policy), "_supports_sdpa", supports_sdpa)
    scorer.policy.register_forward_pre_hook(lambda model, _: used.append(model.config._attn_implementation))
    continuations(scorer.policy, [[3, 4, 5]], 1, settings)
    assert set(used) == {"sdpa" if supports_sdpa else "eager"} and scorer.policy.config._attn_implementation == "flex_attention"
    with _plain_attention(OwnReference(scorer.policy)):
        assert scorer.policy.config._attn_implementation == ("sdpa" if supports_sdpa else "eager")


@pytest.mark.parametrize("option", ["deterministic=true", "model.attn_implementation=sdpa", "max_length=512"])
def test_what_is_asked_for_is_kept(option, monkeypatch):
    monkeypatch.setattr("tdpo.training.guards.flex_attention_problem", None)  # calling it would fail
    scorer = scorer_of("llama", **LLAMA)
    guards_on_a_gpu(option).choose_attention(scorer)
    assert scorer.policy.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), torch.distributed.DistError("lost"), torch.AcceleratorError("dead")], ids=repr)
@pytest.mark.parametrize("trial", [check_predictions, fast_scoring_problem, packing_problem])
def test_what_says_nothing_about_the_model_is_not_taken_for_its_fault(trial, error, monkeypatch):
    """A GPU that can no longer be used, for example, does not make a run score plain."""
    scorer = scorer_of("llama", **FAMILIES["llama"])

    def fail(*_):
        raise error

    for name in ("both_ways", "logits_of_all"):
        monkeypatch.setattr(scorer, name, fail)
    with pytest.raises(type(error)):
        trial(scorer, 32)


@pytest.mark.parametrize("max_length", [2, 3, 33, 512, 4096])
def test_rows_are_no_wider_than_those_of_the_trials(max_length, monkeypatch):
    scorer, widths = scorer_of("llama", **{**FAMILIES["llama"], "max_position_embeddings": 8192}), []
    monkeypatch.setattr("tdpo.scoring.scorer.hidden_states", lambda model, rows, masks: widths.append(rows.input_ids.shape[1]) or 1 / 0)
    monkeypatch.setattr("tdpo.scoring.scorer.attention_masks", lambda *_: None)
    for trial in (fast_scoring_problem, packing_problem):
        with pytest.raises(ZeroDivisionError):
            trial(scorer, max_length)
    assert packing_of(16, max_length).most == max(1, min(widths))
