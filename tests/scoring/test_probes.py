"""Trials of a model before it is trained."""

import pytest
import torch
from helpers import DATA, FAMILIES, MINI, run
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tdpo.losses import get_objective
from tdpo.scoring.probes import check_predictions
from tdpo.scoring.scorer import Scorer
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
