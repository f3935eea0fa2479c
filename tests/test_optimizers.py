"""Optimizers: weight decay is 0 unless asked for, options reach the optimizer, those that it does not take are refused."""

import inspect

import pytest
import torch
from helpers import MINI, PREFERENCE, SHARDED, compose, logs_of, run, weights_of
from omegaconf import OmegaConf

from tdpo.checkpointing.resume import differing_keys
from tdpo.cli.check_config import check_config
from tdpo.losses import get_objective
from tdpo.optimizers import EIGHT_BIT, OPTIMIZERS, bytes_per_weight, make_optimizer, optimizer_class, own_weight_decay
from tdpo.utils import UserError

pytest.importorskip("bitsandbytes")
LIBRARY = (*OPTIMIZERS, *EIGHT_BIT)
NEEDED = {"SGD8bit": {"momentum": 0.9}, "LARS8bit": {"momentum": 0.9}}


def zero_gradient_step(name: str, **options) -> torch.Tensor:
    """Return a weight of ones after a step with a gradient of zero, which weight decay alone changes."""
    weight = torch.nn.Parameter(torch.ones(80, 80))
    optimizer = make_optimizer(name, [[weight]], 0.1, {**NEEDED.get(name, {}), **options})
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("name", LIBRARY)
def test_nothing_decays_unless_asked_for(name):
    # lambd, a part of ASGD's averaging, multiplies weights by 1 - 1e-4 lr.
    torch.testing.assert_close(zero_gradient_step(name), torch.ones(80, 80), rtol=0, atol=2e-5 if name == "ASGD" else 0)
    if "weight_decay" in inspect.signature(optimizer_class(name)).parameters:
        assert not torch.equal(zero_gradient_step(name, weight_decay=0.1), torch.ones(80, 80))
    else:
        assert name == "Rprop"


def test_adamw_would_decay_by_itself():
    assert own_weight_decay("AdamW") == 0.01 and own_weight_decay("RMSprop") == own_weight_decay("Rprop") == 0


def test_norms_and_biases_can_be_left_out_of_the_decay():
    matrix, vector = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))
    for decays_vectors in (True, False):
        optimizer = make_optimizer("SGD", [[matrix, vector]], 0.1, {"weight_decay": 0.5}, decays_vectors)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decay == {id(matrix): 0.5, id(vector): 0.5 if decays_vectors else 0.0}


def test_options_reach_the_optimizer(tmp_path):
    """A run with SGD, momentum and weight decay moves every weight by the formula in its first step."""
    options = [*PREFERENCE, "n_examples=8", "optimizer=SGD", "warmup_steps=0", "lr=0.1", "max_grad_norm=1e-9"]
    plain = weights_of(run(*options, "lr=1e-12", f"local_run_dir={tmp_path}/start"))
    ours = weights_of(run(*options, "optimizer_options.weight_decay=0.5", "decay_norms_and_biases=false", f"local_run_dir={tmp_path}/run"))
    for name, before in plain.items():
        factor = 1 - 0.1 * 0.5 if before.ndim > 1 else 1.0
        torch.testing.assert_close(ours[name], before * factor, rtol=1e-5, atol=1e-7)


def test_lists_become_the_tuples_that_an_optimizer_takes():
    config = compose("exp_name=x", "optimizer=AdamW", "optimizer_options={betas: [0.8, 0.9], weight_decay: 0.1}")
    check_config(config)
    optimizer = make_optimizer("AdamW", [[torch.nn.Parameter(torch.ones(2))]], 1e-3, OmegaConf.to_container(config.optimizer_options))
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["weight_decay"] == 0.1


@pytest.mark.parametrize(
    "given,message",
    [
        ("optimizer_options.weigth_decay=1", "RMSprop has no such argument \\(did you mean weight_decay\\?\\); it has alpha, eps, "),
        ("optimizer_options.lr=1", "optimizer_options.lr: set lr; leave it out"),
        ("optimizer_options.params=1", "optimizer_options.params: the weights are those of the model"),
        ("optimizer_options.weight_decay=-1", "RMSprop refuses this: Invalid weight_decay value: -1"),
        ("optimizer_options.weight_decay=abc", "optimizer_options=.'weight_decay': 'abc'.: RMSprop refuses this"),
        ("optimizer_options.eps=nan", "optimizer_options"),
        ("optimizer_options.alpha.b=1", "RMSprop refuses this"),
        ("optimizer_options.weight_decay=.inf", "optimizer_options"),
        ("optimizer=SGD8bit", "SGD8bit refuses this"),
        ("optimizer=AdamW8bit trainer=FSDPTrainer", "trainer=FSDPTrainer does not split its state; use trainer=BasicTrainer"),
        ("optimizer=Adafactor trainer=FSDPTrainer", "trainer=FSDPTrainer does not split its state; use trainer=BasicTrainer"),
        ("optimizer=AdamW9bit", "did you mean AdamW"),
    ],
)
def test_options_that_an_optimizer_does_not_take_are_refused(given, message):
    with pytest.raises(UserError, match=message) as refused:
        check_config(compose("exp_name=x", *given.split()))
    assert len(str(refused.value).splitlines()) == 1


def test_bitsandbytes_is_optional(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="optimizer=AdamW8bit needs bitsandbytes: pip install bitsandbytes, or use optimizer=AdamW$"):
        check_config(compose("exp_name=x", "optimizer=AdamW8bit"))


@pytest.mark.parametrize("name", [*EIGHT_BIT, "Adam", "Adafactor"])
def test_an_8_bit_run_is_resumed_bit_for_bit(name, tmp_path):
    """The state has bytes, block scales and, as a plain int, the number of steps, on which Adam's correction depends."""
    options = [*PREFERENCE, f"optimizer={name}", "lr=1e-4", "save_every=8", "n_epochs=null", "n_eval_examples=4", "do_first_eval=false"]
    options += [f"optimizer_options.{key}={value}" for key, value in NEEDED.get(name, {}).items()]
    straight = run(*options, "n_examples=48", f"local_run_dir={tmp_path}/straight")
    run_dir = run(*options, "n_examples=24", f"local_run_dir={tmp_path}/run")
    run(*options, "n_examples=48", f"resume={run_dir}")
    assert [log["loss/train"] for log in logs_of(run_dir, "train")] == [log["loss/train"] for log in logs_of(straight, "train")]
    assert all(torch.equal(tensor, weights_of(straight)[key]) for key, tensor in weights_of(run_dir).items())
    start = torch.load(MINI / "sft_policy.pt", weights_only=True)["state"]
    assert not all(torch.equal(tensor, start[key]) for key, tensor in weights_of(run_dir).items())


def test_8_bits_a_number():
    assert bytes_per_weight("RMSprop8bit", {}, torch.float32) == pytest.approx(1, abs=0.05)
    assert bytes_per_weight("AdamW8bit", {}, torch.float32) == pytest.approx(2, abs=0.05)
    assert bytes_per_weight("AdamW", {}, torch.float32) == 8 and bytes_per_weight("AdamW", {}, torch.bfloat16) == 4
    assert bytes_per_weight("SGD", {"momentum": 0.9}, torch.float32) == 4


@pytest.mark.parametrize("optimizer,given,same", [("AdamW", {}, False), ("AdamW", {"weight_decay": 0.01}, True), ("RMSprop", {}, True)])
def test_a_run_from_before_is_not_resumed_with_another_weight_decay(optimizer, given, same):
    """Earlier versions left weight decay to the optimizer: AdamW's own is 0.01."""
    config = OmegaConf.to_container(compose("exp_name=x", f"optimizer={optimizer}"))
    saved = {key: value for key, value in config.items() if key not in ("optimizer_options", "decay_norms_and_biases", "lr_schedule")}
    different = differing_keys(saved, {**config, "optimizer_options": given}, get_objective("sft"))
    assert different == ({} if same else {"optimizer_options.weight_decay": (0.01, None)})


def test_sharded_and_whole_runs_decay_alike(ranks, tmp_path):
    options = [
        *PREFERENCE,
        "optimizer=SGD",
        "optimizer_options.weight_decay=0.3",
        "decay_norms_and_biases=false",
        "n_examples=24",
        "lr=1e-3",
    ]
    one, two = run(*options, f"local_run_dir={tmp_path}/one"), ranks(2).run(*options, *SHARDED, f"local_run_dir={tmp_path}/two")
    for name, tensor in weights_of(one).items():
        torch.testing.assert_close(weights_of(two)[name], tensor, rtol=1e-5, atol=1e-6)


def arguments_of(name: str, n: int, device: str, sharded: bool, monkeypatch) -> dict:
    """Return by which implementation a weight of n numbers would be updated."""
    monkeypatch.setattr("tdpo.optimizers.is_sharded", lambda weights: sharded)
    found = {}

    class Recorder(getattr(torch.optim, name)):
        def __init__(self, params, **arguments):
            found.update(arguments)

    Recorder.__init__.__signature__ = inspect.signature(getattr(torch.optim, name).__init__)
    monkeypatch.setattr(torch.optim, name, Recorder)
    make_optimizer(name, [[torch.nn.Parameter(torch.empty(n, device="meta"))]], 0.1, {}, device=torch.device(device))
    monkeypatch.undo()
    return {key: value for key, value in found.items() if key in ("fused", "foreach")}


@pytest.mark.parametrize(
    "name,n,device,sharded,expected",
    [
        ("AdamW", 10, "cuda", False, {"fused": True}),
        ("AdamW", 10, "cuda", True, {"fused": True}),
        ("RMSprop", 10, "cuda", False, {"foreach": True}),
        ("RMSprop", 10**9, "cuda", False, {"foreach": False}),
        ("RMSprop", 10**9, "cuda", True, {"foreach": True}),
        ("RMSprop", 10, "cpu", True, {"foreach": True}),
        ("RMSprop", 10, "cpu", False, {}),
    ],
)
def test_the_implementation_suits_the_weights(name, n, device, sharded, expected, monkeypatch):
    """Sharded weights are updated many at once, where PyTorch by itself would take them one by one; large ones without a copy of all."""
    assert arguments_of(name, n, device, sharded, monkeypatch) == expected


def test_an_implementation_that_is_asked_for_is_used(monkeypatch):
    monkeypatch.setattr("tdpo.optimizers.is_sharded", lambda weights: True)
    optimizer = make_optimizer("RMSprop", [[torch.nn.Parameter(torch.ones(3))]], 0.1, {"foreach": False})
    assert optimizer.defaults["foreach"] is False
