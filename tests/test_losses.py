"""Each objective against float64 loops written from its paper (oracle.py): its value, and its gradient with respect to the logits."""

import functools
import inspect
import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import oracle
import pytest
import torch
from helpers import ROOT

import trainers
from tdpo import losses
from tdpo.cli.schema import HYPERPARAMETERS
from tdpo.losses import ResponseScores, get_objective
from tdpo.scoring.logps import _get_batch_logps, _tdpo_get_batch_logps

CASES = [
    ("sft", {}),
    ("sft", {"average_log_prob": True}),
    ("dpo", {"beta": 0.1}),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2}),
    ("dpo", {"beta": 0.3, "reference_free": True}),
    ("ipo", {"beta": 0.1}),
    ("ipo", {"beta": 0.4, "average_log_prob": True}),
    ("tdpo1", {"beta": 0.1}),
    ("tdpo1", {"beta": 0.7}),
    ("tdpo2", {"beta": 0.1}),
    ("tdpo2", {"beta": 0.5, "alpha": 1.5}),
    ("rdpo", {"beta": 0.1}),
    ("rdpo", {"beta": 0.6, "label_smoothing": 0.3}),
    ("dpop", {"beta": 0.1}),
    ("dpop", {"beta": 0.4, "dpop_lambda": 3.0}),
    ("simpo", {}),
    ("simpo", {"beta": 5.0, "gamma": 1.0}),
    ("odpo", {"beta": 0.1}),
    ("odpo", {"beta": 0.3, "alpha": 0.4, "kl_weight": 0.2}),
    ("slic", {}),
    ("slic", {"delta": 20.0, "sft_weight": 0.5}),
    ("kto", {"beta": 0.1}),
    ("kto", {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.6}),
    ("kto", {"beta": 0.5, "z0": 0}),
    ("sdpo_stepwise", {"beta": 0.2}),
    ("sdpo_segment", {"beta": 0.2}),
    ("f_dpo", {"beta": 0.1}),
    ("f_dpo", {"beta": 0.2, "divergence": "reverse_kl"}),
    ("f_dpo", {"beta": 0.3, "divergence": "jensen_shannon"}),
    ("f_dpo", {"beta": 0.1, "divergence": "alpha"}),
    ("f_dpo", {"beta": 0.4, "divergence": "alpha", "alpha": 0.1}),
]
WITH_SFT = [
    ("dpo", {"beta": 0.1, "sft_weight": 1.0}),
    ("ipo", {"beta": 0.1, "sft_weight": 0.2}),
    ("tdpo1", {"beta": 0.1, "sft_weight": 0.2}),
    ("tdpo2", {"beta": 0.1, "sft_weight": 3.0}),
    ("simpo", {"sft_weight": 0.2}),
    ("kto", {"beta": 0.1, "sft_weight": 0.5}),
    ("f_dpo", {"beta": 0.1, "divergence": "jensen_shannon", "sft_weight": 0.5}),
]
VOCABULARY = 7


def random_response(rng: random.Random, n_prompt: int, n_tokens: int) -> list:
    """Return the positions of prompt (no label), response and padding (no label), see oracle.py."""
    labels = [None] * n_prompt + [rng.randrange(VOCABULARY) for _ in range(n_tokens)] + [None]
    return [([rng.gauss(0, 2) for _ in range(VOCABULARY)], [rng.gauss(0, 2) for _ in range(VOCABULARY)], label) for label in labels]


def tensors(response: list):
    """Return (logits, reference logits, labels) of one response as the code takes them: position t predicts label t + 1."""
    logits = torch.tensor([[*(p[0] for p in response), [0.0] * VOCABULARY]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[*(p[1] for p in response), [0.0] * VOCABULARY]], dtype=torch.float64)
    labels = torch.tensor([[-100, *(-100 if p[2] is None else p[2] for p in response)]])
    return logits, reference, labels


def scores_of(logits, reference, labels) -> ResponseScores:
    margin, kl, logps = _tdpo_get_batch_logps(logits, reference, labels)
    assert torch.equal(logps, _get_batch_logps(logits, labels))
    reference_logps = _get_batch_logps(reference, labels)
    torch.testing.assert_close(margin, logps - reference_logps, rtol=1e-12, atol=1e-12)
    return ResponseScores(logps, (labels[:, 1:] != -100).sum(-1), reference_logps, kl)


def with_data(name: str, hyperparameters: dict, scores: dict, rng: random.Random) -> tuple[dict, dict]:
    """Add what the loss needs besides log-probabilities. Returns (scores, the oracle's arguments)."""
    if name == "odpo":
        annotations = (rng.uniform(1, 2), rng.uniform(0, 1))
        given = {r: replace(s, annotation=torch.tensor([a], dtype=torch.float64)) for (r, s), a in zip(scores.items(), annotations)}
        return given, {**hyperparameters, "annotations": annotations}
    if name == "kto":
        label, z0 = rng.random() < 0.5, 0.0 if hyperparameters.get("z0") == 0 else rng.uniform(0, 3)
        baseline = None if hyperparameters.get("z0") == 0 else torch.tensor(z0, dtype=torch.float64)
        score = replace(scores["completion"], annotation=torch.tensor([float(label)]), baseline=baseline)
        return {"completion": score}, {**{k: v for k, v in hyperparameters.items() if k != "z0"}, "label": label, "z0": z0}
    return scores, hyperparameters


@pytest.mark.parametrize("name,hyperparameters", CASES + WITH_SFT)
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_match_the_paper(name, hyperparameters, seed):
    rng = random.Random(f"{name}{seed}")
    lengths = {"chosen": 1 + seed * 3, "rejected": 5 - seed, "target": 3, "completion": 4}
    objective = get_objective(name, **hyperparameters)
    # SFT's oracle takes a pair too.
    roles = ("chosen", "rejected") if name == "sft" else objective.roles
    responses = {role: random_response(rng, 2, lengths[role]) for role in roles}
    inputs = {role: tensors(response) for role, response in responses.items()}
    scores, arguments = with_data(name, hyperparameters, {role: scores_of(*values) for role, values in inputs.items()}, rng)
    output = objective(scores)
    output.losses.sum().backward()

    adds_sft = (name, hyperparameters) in WITH_SFT
    oracles = functools.partial(oracle.with_sft, getattr(oracle, name)) if adds_sft else getattr(oracle, name)
    loss, *slopes = oracles(*responses.values(), **arguments)
    assert output.losses.item() == pytest.approx(loss, rel=1e-10, abs=1e-12)
    for role, slope in zip(responses, slopes):
        expected = torch.tensor(oracle.logit_gradient(responses[role], *slope), dtype=torch.float64)
        gradient = inputs[role][0].grad
        gradient = torch.zeros_like(inputs[role][0]) if gradient is None else gradient
        torch.testing.assert_close(gradient[0, :-1], expected, rtol=1e-10, atol=1e-12)
        assert not gradient[0, -1].any()


def random_scores(seed: int, n: int = 6) -> dict[str, ResponseScores]:
    generator = torch.Generator().manual_seed(seed)

    def one():
        logps, reference = (-40 * torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(2))
        kl = 5 * torch.rand(n, generator=generator, dtype=torch.float64)
        return ResponseScores(logps.requires_grad_(), torch.full((n,), 9), reference, kl.requires_grad_())

    return {"chosen": one(), "rejected": one()}


def test_alpha_0_is_dpo_and_alpha_1_is_tdpo1_with_another_gradient():
    scores = random_scores(0)
    kl = scores["chosen"].kl
    assert torch.equal(get_objective("tdpo2", beta=0.2, alpha=0.0)(scores).losses, get_objective("dpo", beta=0.2)(scores).losses)
    two, one = get_objective("tdpo2", beta=0.2, alpha=1.0)(scores), get_objective("tdpo1", beta=0.2)(scores)
    torch.testing.assert_close(two.losses, one.losses, rtol=1e-12, atol=0)
    assert torch.autograd.grad(one.losses.sum(), kl)[0].lt(0).all()  # TDPO1 increases SeqKL of chosen responses
    assert torch.autograd.grad(two.losses.sum(), kl, allow_unused=True)[0] is None  # TDPO2 does not


def test_hyperparameters_that_give_dpo():
    """With these hyperparameters a loss is DPO; ODPO's offset with others is checked by hand."""
    scores = random_scores(3)
    annotated = {role: replace(score, annotation=torch.full((6,), float(role == "chosen"))) for role, score in scores.items()}
    dpo = get_objective("dpo", beta=0.2)(scores)
    same = {"rdpo": {"label_smoothing": 0.0}, "dpop": {"dpop_lambda": 0.0}, "odpo": {"alpha": 0.0}, "sdpo_stepwise": {"parts": 4}}
    same |= {"f_dpo": {"divergence": "reverse_kl"}, "dpo": {"sft_weight": 0.0}}
    for name, hyperparameters in same.items():
        output = get_objective(name, beta=0.2, **hyperparameters)(annotated)
        torch.testing.assert_close(output.losses, dpo.losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(output.rewards, dpo.rewards)
    # Ratings that differ by 1 give no offset; a difference of e^2 gives 2 alpha.
    apart = {role: replace(score, annotation=score.annotation * math.exp(2)) for role, score in annotated.items()}
    assert torch.equal(get_objective("odpo", beta=0.2)(annotated).logits, dpo.logits)
    torch.testing.assert_close(get_objective("odpo", beta=0.2, alpha=0.5)(apart).logits, dpo.logits - 1, check_dtype=False)


def test_hyperparameters_have_ranges():
    for objective in losses.OBJECTIVES.values():
        assert set(inspect.signature(objective.function).parameters) - {"scores"} <= set(HYPERPARAMETERS)


def test_what_a_loss_needs_is_declared():
    assert not any(get_objective(name).needs_reference for name in ("sft", "simpo", "slic"))
    assert get_objective("simpo", log_kl=True).needs_reference and get_objective("dpo", beta=0.1, log_kl=True).needs_kl
    assert {name for name, objective in losses.OBJECTIVES.items() if objective.needs_kl} == {"tdpo1", "tdpo2"}
    assert get_objective("odpo", beta=0.1, kl_weight=0.1).needs_kl and not get_objective("odpo", beta=0.1, kl_weight=0.0).needs_kl
    assert get_objective("kto", beta=0.1).needs_kl_baseline and not get_objective("kto", beta=0.1, z0=0).needs_kl_baseline


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_f_dpo_of_ratios_beyond_every_float_stays_finite(divergence, dtype):
    """Ratios from e^-300 to e^300 in each role: losses and gradients are finite, and push chosen up and rejected down."""
    ratios = torch.tensor([-300.0, -80.0, 0.0, 80.0, 300.0], dtype=dtype)
    chosen, rejected = (x.flatten().requires_grad_() for x in torch.meshgrid(ratios, ratios, indexing="ij"))
    zeros = torch.zeros_like(chosen)
    scores = {"chosen": ResponseScores(chosen, zeros + 9, zeros), "rejected": ResponseScores(rejected, zeros + 9, zeros)}
    output = get_objective("f_dpo", beta=0.1, divergence=divergence)(scores)
    output.losses.sum().backward()
    assert output.losses.isfinite().all() and output.logits.isfinite().all()
    assert all(reward.isfinite().all() for reward in output.rewards.values())
    for gradient, sign in ((chosen.grad, -1), (rejected.grad, 1)):
        assert gradient.isfinite().all() and (sign * gradient >= 0).all()
        assert gradient.square().sum().isfinite()  # the norm by which it is clipped, in the dtype of the gradient
    lost = (chosen == -300) & (rejected == 300)
    assert (chosen.grad[lost] < 0).all()  # a response that was given up is still pulled back


def test_f_dpo_with_alpha_near_0_and_1_is_reverse_and_forward_kl():
    scores = {role: replace(score, reference_logps=score.logps.detach() - i) for i, (role, score) in enumerate(random_scores(5).items())}
    for alpha, divergence in ((1e-7, "reverse_kl"), (1 - 1e-7, "forward_kl")):
        near, exact = (
            get_objective("f_dpo", beta=0.3, **more)(scores)
            for more in ({"divergence": "alpha", "alpha": alpha}, {"divergence": divergence})
        )
        torch.testing.assert_close(near.losses, exact.losses, rtol=1e-6, atol=0)


def test_sft_weight_belongs_to_every_loss_of_preferences():
    assert {name for name, objective in losses.OBJECTIVES.items() if "sft_weight" not in objective.parameters} == {"sft"}
    assert not losses.OBJECTIVES["slic"].adds_sft_loss  # it has a term of its own


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "tdpo2", "rdpo", "dpop", "f_dpo"])
def test_loss_is_ln_2_and_rewards_0_where_policy_equals_reference(name):
    same = {role: ResponseScores(s.logps, s.num_tokens, s.logps.detach(), torch.zeros(6)) for role, s in random_scores(1).items()}
    output = get_objective(name, beta=0.1)(same)
    torch.testing.assert_close(output.losses, torch.full((6,), math.log(2), dtype=torch.float64), rtol=1e-12, atol=0)
    assert not output.rewards["chosen"].any() and not output.rewards["rejected"].any()


def test_rewards_are_the_published_ones_and_logits_are_what_is_trained():
    scores = random_scores(2)
    w, r = scores["chosen"], scores["rejected"]
    output = get_objective("tdpo2", beta=0.3, alpha=0.7)(scores)
    torch.testing.assert_close(output.rewards["chosen"], 0.3 * (w.log_ratio + w.kl).detach())
    torch.testing.assert_close(output.losses, -torch.nn.functional.logsigmoid(output.logits))
    dpo = get_objective("dpo", beta=0.3)(scores)
    torch.testing.assert_close(dpo.rewards["rejected"], 0.3 * r.log_ratio.detach())
    torch.testing.assert_close(dpo.logits, dpo.rewards["chosen"] - dpo.rewards["rejected"])
    assert not any(x.requires_grad for x in (output.logits, *output.rewards.values(), dpo.logits, *dpo.rewards.values()))


def test_tdpo_resolves_to_its_variant():
    assert get_objective("tdpo", beta=0.1, alpha=0.5, if_tdpo2=True, reference_free=False).name == "tdpo2"
    assert get_objective("tdpo", beta=0.1, alpha=0.5, if_tdpo2=False).name == "tdpo1"
    assert get_objective("tdpo", beta=0.1, alpha=0.5, if_tdpo2=False).hyperparameters == {"beta": 0.1}
    with pytest.raises(ValueError, match="reference"):
        get_objective("tdpo", beta=0.1, reference_free=True)
    with pytest.raises(KeyError):
        get_objective("tdpo3")


def test_published_functions_give_the_published_values():
    """functions.json holds inputs and outputs of the published code in float64 (tests/golden/README.md)."""
    golden = json.loads((ROOT / "tests" / "golden" / "functions.json").read_text())

    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    def check(actual, expected):
        torch.testing.assert_close(actual, tensor(expected), rtol=1e-10, atol=1e-10)

    logits, reference, labels = tensor(golden["logits"]), tensor(golden["reference_logits"]), torch.tensor(golden["labels"])
    for average in (False, True):
        suffix = f"average_{str(average).lower()}"
        check(trainers._get_batch_logps(logits, labels, average_log_prob=average), golden[f"get_batch_logps_{suffix}"])
        outputs = trainers._tdpo_get_batch_logps(logits, reference, labels, average_log_prob=average)
        for name, output in zip(("logps_margin", "position_kl", "logps"), outputs):
            check(output, golden[f"tdpo_get_batch_logps_{suffix}"][name])

    names = ("chosen_logps_margin", "rejected_logps_margin", "chosen_position_kl", "rejected_position_kl")
    for case in golden["tdpo_loss"]["cases"]:
        inputs = [tensor(golden["tdpo_loss"][name]).requires_grad_() for name in names]
        outputs = trainers.tdpo_loss(*inputs, beta=case["beta"], alpha=case["alpha"], if_tdpo2=case["if_tdpo2"])
        for name, output in zip(("losses", "chosen_rewards", "rejected_rewards"), outputs):
            check(output, case[name])
        gradients = torch.autograd.grad(outputs[0].sum(), inputs, allow_unused=True)
        for gradient, expected in zip(gradients, case["grads"]):
            check(torch.zeros(5, dtype=torch.float64) if gradient is None else gradient, [0.0] * 5 if expected is None else expected)

    names = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
    for case in golden["preference_loss"]["cases"]:
        options = {k: v for k, v in case.items() if not isinstance(v, list)}
        outputs = trainers.preference_loss(*(tensor(golden["preference_loss"][name]) for name in names), **options)
        for name, output in zip(("losses", "chosen_rewards", "rejected_rewards"), outputs):
            check(output, case[name])


def test_published_signatures():
    """Forks of the published code call these by position and by name."""
    expected = {
        "tdpo_loss": "chosen_logps_margin rejected_logps_margin chosen_position_kl rejected_position_kl beta alpha if_tdpo2",
        "preference_loss": "policy_chosen_logps policy_rejected_logps reference_chosen_logps reference_rejected_logps beta "
        "label_smoothing ipo reference_free",
        "_get_batch_logps": "logits labels average_log_prob",
        "_tdpo_get_batch_logps": "logits reference_logits labels average_log_prob",
        "concatenated_inputs": "batch",
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(trainers, name)).parameters) == parameters.split()


def test_losses_imports_only_torch():
    """The file can be copied elsewhere: it works without transformers, hydra and wandb."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['transformers', 'hydra', 'omegaconf', 'wandb', 'datasets', 'tqdm', 'pydantic']))\n"
        "import torch; from tdpo import losses; s = losses.ResponseScores(*(torch.ones(2),) * 4)\n"
        "print(losses.get_objective('tdpo2', beta=0.1)({'chosen': s, 'rejected': s}).losses.tolist())"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == pytest.approx([math.log(2)] * 2)


def test_every_objective_has_a_config_and_a_test():
    files = {file.stem for file in (ROOT / "config" / "loss").glob("*.yaml")}
    assert files == set(losses.OBJECTIVES) | {"tdpo"}
    assert {name for name, _ in CASES} == set(losses.OBJECTIVES)
