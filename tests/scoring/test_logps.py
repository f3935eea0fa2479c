"""Scores of plain scoring: values against the oracle, masked positions, and computing in another dtype."""

import copy
import math

import oracle
import pytest
import torch
from helpers import FAMILIES, MINI, compose
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tdpo.data.batching import get_collate_fn
from tdpo.data.tokenization import tokenize_batch_element
from tdpo.losses import get_objective
from tdpo.models.build import Models, load_model_config
from tdpo.models.tokenizer import load_tokenizer
from tdpo.scoring.logps import _get_batch_logps, _tdpo_get_batch_logps, concatenated_inputs, forward_kl
from tdpo.scoring.mixed_precision import cast_parameters, slow_dtype
from tdpo.scoring.scorer import Scorer


def load(dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(MINI / "model", dtype=dtype)


@pytest.fixture(scope="module")
def model():
    return load(torch.float32)


@pytest.fixture(scope="module")
def batch(mini_tokenizer):
    pairs = [
        ("\n\nHuman: wind help\n\nAssistant:", " hills boat", " the read cross clouds"),
        ("\n\nHuman: over\n\nAssistant:", " is", " how"),
    ]
    return get_collate_fn(mini_tokenizer)([tokenize_batch_element(*pair, "keep_end", mini_tokenizer, 64, 32) for pair in pairs])


def perturbed(model, scale: float = 0.1):
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return other


def test_plain_scores_match_the_oracle(model, batch):
    """The oracle loops over each sequence separately, without padding; policy and reference are in float64."""
    policy, reference = copy.deepcopy(model).double(), perturbed(model).double()
    scores = Scorer(policy, reference, get_objective("tdpo2", beta=0.1))(batch).scores
    for role in ("chosen", "rejected"):
        for i in range(2):
            length = batch[f"{role}_attention_mask"][i].sum()
            ids, labels = (batch[f"{role}_{kind}"][i, :length] for kind in ("input_ids", "labels"))
            with torch.no_grad():
                logits, reference_logits = (m(ids[None]).logits[0, :-1].tolist() for m in (policy, reference))
            response = list(zip(logits, reference_logits, [None if x == -100 else x for x in labels[1:].tolist()]))
            logps, reference_logps, kl, count = oracle.score(response)
            got = scores[role]
            expected = [logps, reference_logps, kl, count]
            for actual, value in zip((got.logps, got.reference_logps, got.kl, got.num_tokens), expected):
                assert actual[i].item() == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_have_no_effect(poison):
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 6, 5, requires_grad=True), torch.randn(2, 6, 5)
    labels = torch.tensor([[-100, -100, 1, 4, -100, -100], [-100, 2, 0, 3, 1, -100]])
    clean = _tdpo_get_batch_logps(logits, reference, labels)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in clean), logits)

    ignored = torch.ones(2, 6, dtype=torch.bool)
    ignored[:, :-1] = labels[:, 1:] == -100
    poisoned = logits.detach().masked_fill(ignored[..., None], poison).requires_grad_()
    outputs = _tdpo_get_batch_logps(poisoned, reference.masked_fill(ignored[..., None], poison), labels)
    for a, b in zip(outputs, clean):
        assert torch.equal(a, b)
    assert torch.equal(_get_batch_logps(poisoned, labels), clean[2])
    (poisoned_gradient,) = torch.autograd.grad(sum(x.sum() for x in outputs), poisoned)
    assert torch.equal(poisoned_gradient, gradient)


def test_logits_200_apart_give_a_finite_loss_and_gradient():
    """exp(-200) is 0 in float32, so the published softmax().log() gives 0 * -inf = NaN here."""
    logits = torch.tensor([[[0.0, 200.0, -200.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    reference = torch.tensor([[[200.0, 0.0, -200.0], [0.0, 0.0, 0.0]]])
    margin, kl, logps = _tdpo_get_batch_logps(logits, reference, torch.tensor([[-100, 0]]))
    assert kl.item() == pytest.approx(200.0) and margin.item() == pytest.approx(-200.0) and logps.item() == pytest.approx(-200.0)
    (kl - margin).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


def test_an_entry_with_probability_0_in_both_adds_nothing():
    logits = torch.tensor([0.3, -0.2, -math.inf], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, 0.1, -math.inf], dtype=torch.float64).log_softmax(-1)
    kl = forward_kl(reference, logits.log_softmax(-1))
    kl.backward()
    expected = oracle.score([([0.3, -0.2], [-0.5, 0.1], 0)])[2]
    assert kl.item() == pytest.approx(expected, rel=1e-12) and logits.grad.isfinite().all()


def test_concatenated_inputs_pads_to_the_longer(batch):
    stacked = concatenated_inputs(batch)
    n, longest = 2, max(batch["chosen_input_ids"].shape[1], batch["rejected_input_ids"].shape[1])
    assert {k: tuple(v.shape) for k, v in stacked.items()} == {
        f"concatenated_{kind}": (2 * n, longest) for kind in ("input_ids", "attention_mask", "labels")
    }
    width = batch["chosen_input_ids"].shape[1]
    assert torch.equal(stacked["concatenated_input_ids"][:n, :width], batch["chosen_input_ids"])
    assert (stacked["concatenated_labels"][:n, width:] == -100).all() and not stacked["concatenated_attention_mask"][:n, width:].any()


def test_labels_that_do_not_fit_the_logits_are_refused():
    with pytest.raises(ValueError, match="do not match labels"):
        _get_batch_logps(torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"reference_logits \(1, 5, 4\) and logits \(1, 4, 4\) have different shapes"):
        _tdpo_get_batch_logps(torch.zeros(1, 4, 4), torch.zeros(1, 5, 4), torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    "device, dtype, has, slow",
    [
        ("cpu", torch.bfloat16, {"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ("cpu", torch.bfloat16, {"avx2": True, "avx512_bf16": True}, False),
        ("cpu", torch.bfloat16, {"avx2": True, "amx_bf16": True}, False),
        ("cpu", torch.bfloat16, {"avx2": True, "avx512_fp16": True}, True),
        ("cpu", torch.float16, {"avx2": True, "avx512_bf16": True, "avx512_fp16": False}, True),
        ("cpu", torch.float16, {"avx2": True, "avx512_fp16": True}, False),
        ("cpu", torch.bfloat16, {"neon": True, "bf16": False}, False),  # not known
        ("cpu", torch.float32, {"avx2": True}, False),
        ("cuda", torch.bfloat16, {"avx2": True}, False),
    ],
)
def test_a_dtype_is_slow_on_a_processor_without_instructions_for_it(device, dtype, has, slow, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    said = slow_dtype(torch.device(device), dtype)
    assert said.startswith(f"{str(dtype).removeprefix('torch.')} is no faster") if slow else said == ""
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in older versions of PyTorch
    assert slow_dtype(torch.device(device), dtype) == ""


def test_gradients_of_a_cast_policy_reach_its_float32_weights(model, batch):
    """Computing in bfloat16 gives what a bfloat16 model gives; weights and gradients stay in float32."""
    objective = get_objective("sft")
    policy, half = copy.deepcopy(model), load(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    with cast_parameters(policy, torch.bfloat16):
        loss = Scorer(policy, None, objective)(batch).loss
        loss.backward()
    expected = Scorer(half, None, objective)(batch).loss
    expected.backward()
    assert torch.equal(loss, expected)
    halves = dict(half.named_parameters())
    assert list(dict(policy.named_parameters())) == list(before)
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and torch.equal(parameter, before[name])
        assert torch.equal(parameter.grad, halves[name].grad.float())


def test_policy_equals_a_bfloat16_reference_exactly(model, batch):
    objective = get_objective("tdpo2", beta=0.1)
    policy, reference = copy.deepcopy(model), load(torch.bfloat16)
    scorer = Scorer(policy, reference, objective)
    with cast_parameters(policy, torch.bfloat16), torch.no_grad():
        scores = scorer(batch).scores
    for score in scores.values():
        assert not score.kl.any() and not score.log_ratio.any()


def test_tied_weights_stay_tied_in_a_cast():
    torch.manual_seed(0)
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with cast_parameters(tied, torch.bfloat16):
        assert tied.lm_head.weight is tied.transformer.wte.weight and tied.lm_head.weight.dtype == torch.bfloat16
        tied(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
    assert tied.lm_head.weight is tied.transformer.wte.weight and tied.lm_head.weight.dtype == torch.float32
    assert tied.lm_head.weight.grad is not None and "lm_head.weight" in tied.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_samples_in_bfloat16(family):
    """Each model family in config/model scores in bfloat16, gets float32 gradients, and samples."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family], **ids), dtype=torch.float32)
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8, 0], [3, 9, 10, 11, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    labels = torch.tensor([[-100, -100, 5, 6, 7, 8, 0], [-100, -100, 10, 11, 0, -100, -100]])
    batch = {"chosen_input_ids": tokens, "chosen_attention_mask": mask, "chosen_labels": labels}
    objective = get_objective("sft")
    scorer = Scorer(policy, None, objective)
    exact = scorer(batch).output.losses
    with cast_parameters(policy, torch.bfloat16):
        scored = scorer(batch)
        scored.loss.backward()
    torch.testing.assert_close(scored.output.losses, exact, rtol=0.02, atol=0.02)  # bfloat16 has 8 significant bits
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in policy.parameters())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in policy.parameters()) > 5
    with torch.no_grad(), cast_parameters(policy, torch.bfloat16):
        sample = policy.generate(input_ids=tokens[:, :3], attention_mask=mask[:, :3], max_length=6, do_sample=True, pad_token_id=0)
    assert sample.shape[0] == 2 and {p.dtype for p in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_policy_and_reference_of_every_family_agree_exactly_in_bfloat16(family):
    """Both are built as in a run: the policy computes with cast weights, the reference's weights are bfloat16. Buffers must agree too."""
    config = compose("exp_name=x", "model.fsdp_policy_mp=bfloat16").model
    OmegaConf.set_struct(config, False)
    config.from_config = {"model_type": family, **{key: value for key, value in FAMILIES[family].items() if key != "vocab_size"}}
    tokenizer = load_tokenizer(config, None)
    models = Models(config, load_model_config(config, tokenizer, None), None, None, needs_reference=True, max_length=64)
    policy, reference = models.policy(), models.reference()
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    pairs = [("this drama", " was good .", " was very dull ."), ("the western", " felt weak", " was not bad at the end .")]
    batch = get_collate_fn(tokenizer)([tokenize_batch_element(*pair, "keep_end", tokenizer, 32, 16) for pair in pairs])
    scorer = Scorer(policy, reference, get_objective("tdpo2", beta=0.1))
    with torch.no_grad(), cast_parameters(policy, torch.bfloat16):
        for score in scorer(batch).scores.values():
            assert not score.kl.any() and not score.log_ratio.any()


def test_sums_over_a_long_response_are_exact():
    """Values of 1,500 tokens, each in float32, are summed in float64, because log-ratios are small differences of such sums."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1501, 40, generator=generator) * 3
    reference_logits = logits + 1e-3 * torch.randn(logits.shape, generator=generator)
    labels = torch.randint(40, (2, 1501), generator=generator)
    log_ratio, kl, logps = _tdpo_get_batch_logps(logits, reference_logits, labels)
    p, q = (x[:, :-1].log_softmax(-1) for x in (logits, reference_logits))
    for row in range(2):
        tokens = [(p[row, t, labels[row, t + 1]].item(), q[row, t, labels[row, t + 1]].item()) for t in range(1500)]
        assert logps[row].item() == pytest.approx(math.fsum(own for own, _ in tokens), rel=1e-14)
        assert log_ratio[row].item() == pytest.approx(math.fsum(own - other for own, other in tokens), rel=1e-10)
        assert kl[row].item() == pytest.approx(math.fsum(forward_kl(q[row], p[row]).tolist()), rel=1e-12)
    assert _get_batch_logps(logits, labels).tolist() == logps.tolist()
