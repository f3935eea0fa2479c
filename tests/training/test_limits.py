"""keep_best and stop_when: the BEST checkpoint, a budget of KL and a patience, in straight, killed and resumed runs."""

import os
import shutil
from pathlib import Path

import pytest
from helpers import PREFERENCE, SHARDED, TIMES, assert_same_run, compose, copied, logs_of, run

from tdpo.analysis.findings import findings
from tdpo.cli.check_config import check_config
from tdpo.losses import OBJECTIVES, get_objective
from tdpo.training.limits import Best, Limit, check_limits, eval_metrics, reason_to_stop
from tdpo.utils import UserError

BUDGET = 0.36  # nats, reached after 72 examples, when the best margin is past
OPTIONS = [
    *PREFERENCE,
    "n_epochs=null",
    "n_examples=96",
    "eval_every=8",
    "n_eval_examples=8",
    "optimizer=Adam",
    "lr=1e-3",
    "warmup_steps=0",
]
LIMITED = [*OPTIONS, "keep_best.metric=rewards_eval/margins", "keep_best.mode=max", f"stop_when={{kl_eval/chosen: {BUDGET}}}"]


@pytest.fixture(scope="module")
def free(tmp_path_factory) -> list[dict]:
    """The evals of the run without limits."""
    return logs_of(run(*OPTIONS, f"local_run_dir={tmp_path_factory.mktemp('free')}/run"), "eval")


@pytest.fixture(scope="module")
def limited(tmp_path_factory) -> Path:
    return run(*LIMITED, f"local_run_dir={tmp_path_factory.mktemp('limited')}/run")


def first_over(evals: list[dict], budget: float) -> int:
    return next(log["counters/examples"] for log in evals if log["kl_eval/chosen"] >= budget)


def best_of(evals: list[dict], metric: str, choose=max) -> int:
    values = [(log[metric], log["counters/examples"]) for log in evals if log["counters/examples"] > 0]
    target = choose(value for value, _ in values)
    return next(examples for value, examples in values if value == target)


def test_a_run_ends_with_the_first_eval_at_the_budget(limited, free):
    evals = logs_of(limited, "eval")
    end = first_over(free, BUDGET)
    assert 8 < end < 96 and evals[-1]["counters/examples"] == end
    assert evals == [log for log in free if log["counters/examples"] <= end]
    assert os.readlink(limited / "LATEST") == f"step-{end}" and (limited / "LATEST" / "hf" / "config.json").exists()
    assert os.readlink(limited / "BEST") == f"step-{best_of(evals, 'rewards_eval/margins')}"
    assert len(logs_of(limited, "train")) == end // 8


def test_a_finished_run_trains_no_further_and_a_larger_budget_continues_it(limited, free, tmp_path, capsys):
    run_dir = copied(limited, tmp_path / "run")
    before = (run_dir / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    run(*LIMITED, f"local_run_dir={run_dir}", "resume=auto")
    end = first_over(free, BUDGET)
    reason = f"the run ends after {end} examples, by stop_when: kl_eval/chosen is "
    assert reason in capsys.readouterr().out and (run_dir / "metrics.jsonl").read_bytes() == before
    run(*OPTIONS, "stop_when={kl_eval/chosen: 1000}", f"resume={run_dir}")
    assert without_times(logs_of(run_dir, "eval")) == without_times(free)


def without_times(logs: list[dict]) -> list[dict]:
    return [{name: value for name, value in log.items() if name not in TIMES} for log in logs]


@pytest.mark.parametrize("kept", [8, 16, 24])
def test_best_and_end_are_the_same_after_an_interruption(kept, limited, tmp_path):
    """All checkpoints but the first ones are gone, and BEST is left pointing nowhere, as a kill at that moment leaves it."""
    run_dir = copied(limited, tmp_path / "run")
    for folder in run_dir.glob("step-*"):
        if int(folder.name[5:]) > kept:
            shutil.rmtree(folder)
    run(*LIMITED, f"resume={run_dir}")
    assert_same_run(run_dir, limited)
    for link in ("BEST", "LATEST"):
        assert os.readlink(run_dir / link) == os.readlink(limited / link)


def test_ranks_end_and_keep_alike(limited, ranks, tmp_path):
    two = ranks(2).run(*LIMITED, *SHARDED, f"local_run_dir={tmp_path}/two")
    assert [log["counters/examples"] for log in logs_of(two, "eval")] == [log["counters/examples"] for log in logs_of(limited, "eval")]
    assert os.readlink(two / "BEST") == os.readlink(limited / "BEST")
    shutil.rmtree(max(two.glob("step-*"), key=lambda folder: int(folder.name[5:])))
    ranks(2).run(*LIMITED, *SHARDED, f"resume={two}")
    assert os.readlink(two / "BEST") == os.readlink(limited / "BEST") and os.readlink(two / "LATEST") == os.readlink(limited / "LATEST")


def test_the_best_is_saved_between_checkpoints_and_never_removed(free, tmp_path):
    """save_every is longer than the run, and keep_checkpoints=1: the best evals get checkpoints, of which the last one stays."""
    options = [*OPTIONS, "n_examples=48", "save_every=800", "keep_checkpoints=1", "keep_best.metric=kl_eval/chosen", "keep_best.mode=min"]
    run_dir = run(*options, f"local_run_dir={tmp_path}/run")
    best = best_of([log for log in free if log["counters/examples"] <= 48], "kl_eval/chosen", min)
    assert best == 8  # KL grows: the worst case for removal
    assert sorted(folder.name for folder in run_dir.glob("step-*")) == ["step-48", "step-8"]
    assert os.readlink(run_dir / "BEST") == "step-8" and os.readlink(run_dir / "LATEST") == "step-48"
    again = run(*OPTIONS, "n_examples=8", f"model.archive={run_dir}/BEST", f"local_run_dir={tmp_path}/again")
    assert logs_of(again, "eval")[0]["kl_eval/chosen"] == 0


def test_patience_ends_a_run_that_no_longer_improves(free, tmp_path, capsys):
    options = [*OPTIONS, "keep_best.metric=kl_eval/chosen", "keep_best.mode=min", "stop_when={patience: 3}"]
    run_dir = run(*options, f"local_run_dir={tmp_path}/run")
    assert logs_of(run_dir, "eval")[-1]["counters/examples"] == 8 + 3 * 8
    line = "by stop_when: kl_eval/chosen has not improved on "
    assert line in capsys.readouterr().out
    (found,) = [answer.text for answer in findings(logs_of(run_dir), config=settings(options)) if "stop_when" in answer.text]
    assert found.startswith("The run reached stop_when after 32 examples: kl_eval/chosen has not improved on ")


def settings(options: list[str]) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(compose("exp_name=x", *options))


def test_findings_name_the_end_and_the_best(limited, free):
    texts = [answer.text for answer in findings(logs_of(limited), config=settings(LIMITED))]
    best = best_of(logs_of(limited, "eval"), "rewards_eval/margins")
    assert any(
        text.startswith(f"The run reached stop_when after {first_over(free, BUDGET)} examples: kl_eval/chosen is ") for text in texts
    )
    assert any(
        text.startswith("The best eval by rewards_eval/margins (max): ") and text.endswith(f"after {best} examples.") for text in texts
    )
    assert not any("stop_when" in answer.text for answer in findings(logs_of(limited)))


def test_a_best_checkpoint_that_is_gone_is_said(limited, tmp_path, capsys):
    run_dir = copied(limited, tmp_path / "run")
    best = os.readlink(run_dir / "BEST")
    newest = os.readlink(run_dir / "LATEST")
    options = [*OPTIONS, "keep_best.metric=rewards_eval/margins", "keep_best.mode=max"]
    assert best != newest
    shutil.rmtree(run_dir / best)
    capsys.readouterr()
    run(*options, f"resume={run_dir}")
    assert "is gone: BEST is the best from now on" in capsys.readouterr().out and (run_dir / "BEST").exists()


def test_another_metric_begins_anew_and_says_so(limited, tmp_path, capsys):
    run_dir = copied(limited, tmp_path / "run")
    capsys.readouterr()
    run(*OPTIONS, "keep_best.metric=kl_eval/chosen", f"resume={run_dir}")
    line = "keep_best was rewards_eval/margins (max) and is kl_eval/chosen (min): BEST is chosen anew"
    assert line in capsys.readouterr().out and int(os.readlink(run_dir / "BEST")[5:]) > logs_of(limited, "eval")[-1]["counters/examples"]


def test_a_budget_at_the_start_ends_the_run_before_its_first_step(tmp_path):
    run_dir = run(*OPTIONS, "stop_when={kl_eval/chosen: 0}", f"local_run_dir={tmp_path}/run")
    assert not logs_of(run_dir, "train") and os.readlink(run_dir / "LATEST") == "step-0"


@pytest.mark.parametrize(
    "given,value,reached",
    [
        (20, 20.0, True),
        (20, 19.99, False),
        (20, 400.0, True),
        (">=20", 20.0, True),
        ("<0.5", 0.5, True),
        ("<= 0.5", 0.51, False),
        ("-1e2", -100.0, True),
    ],
)
def test_values_are_reached_from_below_or_from_above(given, value, reached):
    assert bool(Limit.of("a", given).reached({"a": value})) == reached
    assert not Limit.of("a", given).reached({}) and not Limit.of("a", given).reached({"a": None})
    assert not Limit.of("a", given).reached({"a": float("nan")})


@pytest.mark.parametrize("mode,sign", [("max", 1), ("min", -1)])
def test_the_best_by_hand(mode, sign):
    best = Best("a", mode)
    for examples, value in ((1, 0.5), (2, float("nan")), (3, 0.7), (4, 0.7), (5, None), (6, 0.6)):
        best.see({"a": value and sign * value}, examples)
    assert (best.value, best.examples, best.evals_since) == (sign * 0.7, 3, 3)
    assert reason_to_stop({"patience": 3}, {}, best) and not reason_to_stop({"patience": 4}, {}, best)
    assert not reason_to_stop({"patience": 1}, {}, Best("a", "min"))


@pytest.mark.parametrize(
    "given,message",
    [
        (
            "keep_best.metric=loss/evl",
            r"keep_best.metric=loss/evl: no metric of this run's evals \(did you mean loss/eval\?\); there are loss/eval, ",
        ),
        ("keep_best.metric=loss/train", "no metric of this run's evals"),
        ("keep_best.metric=logps_eval/chosen", "set keep_best.mode to min or max"),
        ("keep_best.mode=min", "keep_best.mode=min needs keep_best.metric"),
        ("keep_best.mode=most keep_best.metric=loss/eval", "keep_best.mode=most: must be 'min' or 'max'"),
        ("loss=dpo stop_when={kl_eval/chosen:20}", r"stop_when\[kl_eval/chosen\]: no metric of this run's evals"),
        ("stop_when={kl_eval/choosen:20}", r"stop_when\[kl_eval/choosen\]: no metric .* \(did you mean kl_eval/chosen\?\)"),
        ("stop_when={loss/eval:soon}", r"stop_when\[loss/eval\]=soon: must be a number"),
        ("stop_when={loss/eval:true}", r"stop_when\[loss/eval\]=True: must be a number"),
        ("stop_when={patience:0} keep_best.metric=loss/eval", r"stop_when\[patience\]=0: must be a number of evals"),
        ("stop_when={patience:3}", r"stop_when\[patience\] needs keep_best.metric"),
        ("stop_when=20", "stop_when"),
    ],
)
def test_limits_that_are_none_are_refused(given, message):
    with pytest.raises(UserError, match=message) as refused:
        config = compose("exp_name=x", "loss=tdpo", *given.split())
        check_limits(config, check_config(config).objective)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_names_of_an_evals_metrics_are_known_before(name, tmp_path):
    """For a loss that this dataset serves, the names are those of a run; for the others they can at least be asked for."""
    known = eval_metrics(get_objective(name, **({"beta": 0.1} if "beta" in OBJECTIVES[name].parameters else {})), ["hh"])
    assert "loss/eval" in known and len(set(known)) == len(known)
    if name in ("sft", "tdpo2", "simpo", "slic", "kto"):
        options = [*PREFERENCE, f"loss={name}", "n_examples=8", "datasets.hh.unpair=true", "n_eval_examples=8"]
        (log, *_) = logs_of(run(*options, f"local_run_dir={tmp_path}/run"), "eval")
        assert set(log) - {"split", "counters/examples"} == set(known)


def test_the_usual_mode_is_known_for_losses_kl_and_accuracies():
    config = compose("exp_name=x", "loss=tdpo", "keep_best.metric=rewards_eval/accuracies")
    check_limits(config, check_config(config).objective)
    assert Best.of(config).mode == "max"
    assert [Best.of({"keep_best": {"metric": metric, "mode": None}}).mode for metric in ("loss/eval", "kl_eval/rejected")] == ["min", "min"]
