"""Learning rates against formulas, in whole, resumed and extended runs."""

import math
import shutil

import pytest
from helpers import DATA, PREFERENCE, assert_same_run, compose, logs_of, run

from tdpo.cli.check_config import check_config
from tdpo.training.schedule import Schedule
from tdpo.utils import UserError

STEPS = 40
FORMULAS = {
    "constant": lambda p: 1.0,
    "linear": lambda p: 1 - p,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
}


def schedule(kind: str, **more) -> Schedule:
    return Schedule(**{"kind": kind, "lr": 3e-4, "min_lr": 1e-5, "warmup_steps": 8, "decay_steps": 12, "steps": STEPS, **more})


@pytest.mark.parametrize("kind", FORMULAS)
def test_learning_rates_are_those_of_the_formulas(kind):
    rates = [schedule(kind)(step) for step in range(STEPS)]
    warmup = [3e-4 * (step + 1) / 9 for step in range(8)]
    low = 3e-4 if kind == "constant" else 1e-5
    rest = [low + (3e-4 - low) * FORMULAS[kind]((step - 8) / 32) for step in range(8, STEPS)]
    assert rates == pytest.approx(warmup + rest, rel=1e-12)
    assert schedule(kind)(STEPS) == schedule(kind)(STEPS + 100) == pytest.approx(low)


def test_wsd_is_constant_until_its_last_steps():
    rates = [schedule("wsd")(step) for step in range(STEPS)]
    assert rates[8:28] == [3e-4] * 20
    assert rates[28:] == pytest.approx([1e-5 + 2.9e-4 * (1 - i / 12) for i in range(12)], rel=1e-12)


@pytest.mark.parametrize("warmup,decay", [(50, 12), (39, 40), (40, 1), (0, 0), (30, 20)])
def test_a_decay_never_begins_before_the_warm_up_ends_nor_divides_by_zero(warmup, decay):
    for kind in (*FORMULAS, "wsd"):
        rates = [schedule(kind, warmup_steps=warmup, decay_steps=decay)(step) for step in range(STEPS + 3)]
        assert all(0 < rate <= 3e-4 for rate in rates)
        assert rates[: min(warmup, STEPS)] == [3e-4 * (step + 1) / (warmup + 1) for step in range(min(warmup, STEPS))]


@pytest.mark.parametrize(
    "given,steps,counted", [(0.1, 40, 4), (0.1, 41, 5), (0.1, 10, 1), (1, 40, 1), (7, 5, 7), (0, 40, 0), (0.999, 10, 10)]
)
def test_a_share_is_rounded_up_and_a_number_is_taken_as_it_is(given, steps, counted):
    config = compose("exp_name=x", f"warmup_steps={given}", f"decay_steps={given}", "lr_schedule=wsd")
    check_config(config)
    made = Schedule.of(config, steps)
    assert (made.warmup_steps, made.decay_steps) == (counted, counted)


@pytest.mark.parametrize(
    "given", ["warmup_steps=1.5", "warmup_steps=-0.1", "min_lr=1", "min_lr=-1", "lr_schedule=polynomial", "decay_steps=-1"]
)
def test_values_that_are_no_schedule_are_refused(given):
    with pytest.raises(UserError, match=given.split("=")[0]):
        check_config(compose("exp_name=x", "lr=1e-3", "model=pythia28", "datasets=[hh]", given))


def test_a_key_without_effect_is_said():
    assert "lr_schedule=constant: min_lr has no effect" in check_config(compose("exp_name=x", "min_lr=1e-6")).notes


DECAYING = [*PREFERENCE, "n_epochs=null", "eval_every=40", "save_every=8", "n_eval_examples=4"]


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_a_run_resumed_in_the_midst_of_a_decay_continues_it(kind, tmp_path):
    options = [*DECAYING, f"lr_schedule={kind}", "min_lr=1e-5", "decay_steps=0.5", "warmup_steps=0.2", "n_examples=80"]
    straight = run(*options, f"local_run_dir={tmp_path}/straight")
    made = Schedule(kind, 5e-4, 1e-5, 2, 5, 10)
    assert [log["lr"] for log in logs_of(straight, "train")] == [made(step) for step in range(10)]
    run_dir = interrupted(options, tmp_path / "run", 48)
    assert_same_run(run(*options, f"resume={run_dir}"), straight)


def interrupted(options: list[str], run_dir, examples: int):
    """Make a run and remove its checkpoints after `examples`, as if it had been killed before the next one."""
    made = run(*options, f"local_run_dir={run_dir}")
    for folder in made.glob("step-*"):
        if int(folder.name[5:]) > examples:
            shutil.rmtree(folder)
    return made


def test_extending_a_decayed_run_says_what_happens_to_the_learning_rate(tmp_path, capsys):
    options = [*DECAYING, "lr_schedule=linear", "warmup_steps=0", "eval_every=400"]
    run_dir = run(*options, "n_examples=32", f"local_run_dir={tmp_path}/run")
    capsys.readouterr()
    run(*options, "n_examples=64", f"resume={run_dir}")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("learning rate: "))
    assert "now ends at step 8 " in line and "before at step 4 " in line and "the next step has 0.00025, it would have had 0" in line
    rates = [log["lr"] for log in logs_of(run_dir, "train")]
    assert rates == pytest.approx([5e-4 * (1 - i / 4) for i in range(4)] + [5e-4 * (1 - i / 8) for i in range(4, 8)])


def test_extending_a_run_without_a_decay_says_nothing(tmp_path, capsys):
    run_dir = run(*DECAYING, "n_examples=16", f"local_run_dir={tmp_path}/run")
    run(*DECAYING, "n_examples=32", f"resume={run_dir}")
    assert "learning rate: " not in capsys.readouterr().out


def test_the_console_names_the_schedule(tmp_path, capsys):
    run(*DATA, "lr_schedule=cosine", "warmup_steps=0.25", "n_examples=32", "n_epochs=null", f"local_run_dir={tmp_path}/run")
    assert "; lr 0.0005 after 1 step of warm-up, then cosine decay to 0" in capsys.readouterr().out
