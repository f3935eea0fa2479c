"""experiments/frontier: envelopes and ratios by hand, pairs by reward, and the whole pipeline at a small size."""

import importlib.util
import json
import sys

import pytest
from helpers import ROOT, forked_script
from omegaconf import OmegaConf

HERE = ROOT / "experiments" / "frontier"


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"frontier_{name}", HERE / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


report = module("report")


def a_run(method: str, seed: int, *points: tuple[float, float]):
    return report.Run(method, seed, 0.1, 1e-4, [{report.KL: kl, report.REWARD: reward} for kl, reward in points])


def test_kl_at_a_reward_by_hand():
    """Linear in the square root of KL between two measurements; the lowest KL over several runs and crossings."""
    runs = [a_run("DPO", 0, (0, 0.5), (2, 0.7), (6, 0.9)), a_run("DPO", 0, (0, 0.5), (3, 0.85), (4, 0.75), (9, 0.95))]
    assert report.least_kl(runs[:1], 0.8) == pytest.approx(((2**0.5 + 6**0.5) / 2) ** 2)
    assert report.least_kl(runs, 0.8) == pytest.approx(3 * (0.3 / 0.35) ** 2)
    assert report.least_kl([a_run("DPO", 0, (0, 0.7), (1, 0.8))], 0.65) == 0  # the SFT model already has it
    assert report.least_kl(runs, 0.9) == pytest.approx(6.0) and report.least_kl(runs, 0.96) is None


def test_a_method_does_not_seem_better_by_where_it_was_measured():
    """Two methods on one curve, reward 0.5 + 0.1 sqrt(KL), measured at different points of it, need the same KL at every reward."""
    near, far = (a_run("DPO", 0, *((kl, 0.5 + 0.1 * kl**0.5) for kl in kls)) for kls in ((0, 0.25, 4, 9), (0, 3, 9)))
    for level in (0.52, 0.6, 0.7, 0.75):
        assert report.least_kl([near], level) == pytest.approx(report.least_kl([far], level)) == pytest.approx(((level - 0.5) / 0.1) ** 2)


def test_best_setting_is_that_of_the_run_that_needs_the_least_kl():
    """For 0.8 the second run, with its larger beta; for 0.9 only the first one comes there, and with the other seed none."""
    runs = [
        a_run("DPO", 0, (0, 0.5), (4, 0.9)),
        a_run("DPO", 0, (0, 0.5), (1, 0.85))._replace(beta=2.0),
        a_run("DPO", 1, (0, 0.5), (1, 0.6)),
    ]
    assert report.at_levels(runs, [0.8, 0.9], report.best_setting) == {"0.8": {0: "2, 0.0001", 1: None}, "0.9": {0: "0.1, 0.0001", 1: None}}


def test_kl_is_compared_with_dpos_and_with_that_of_the_method_before():
    """At a reward of 0.9 the methods need 4, 2 and 1 nats, with both seeds."""
    methods = {"DPO": 4, "TDPO1": 2, "TDPO2 0.5": 1}
    whole = dict.fromkeys(report.GRID, 0.0)
    runs = [a_run(name, seed, (0, 0.5), (kl, 0.9)) for name, kl in methods.items() for seed in (0, 1)]
    runs = [run._replace(points=[{**whole, **point} for point in run.points]) for run in runs]
    task = OmegaConf.create({"levels": [0.9], "shown": {"beta": 0.1, "lr": 1e-4}, "n_prompts": 1, "n": 1})
    results = report.results_of(runs, list(methods), task)
    means = {key: {name: levels["0.9"]["mean"] for name, levels in results[key].items()} for key in ("kl_over_dpo", "kl_over_previous")}
    assert means["kl_over_dpo"] == pytest.approx({"TDPO1": 0.5, "TDPO2 0.5": 0.25})
    assert means["kl_over_previous"] == pytest.approx({"TDPO1": 0.5, "TDPO2 0.5": 0.5})


def test_ratios_are_taken_seed_by_seed():
    base = {"0.8": {0: 4.0, 1: 2.0, 2: 5.0}, "0.9": {0: 8.0, 1: None, 2: None}}
    other = {"0.8": {0: 2.0, 1: 1.0, 2: 2.5}, "0.9": {0: 2.0, 1: 1.0, 2: None}}
    ratios = report.ratio_to(base, other)
    assert ratios["0.8"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5, "seeds": 3, "of": 3})
    assert ratios["0.9"] is None  # a single seed gives no interval
    assert report.ratio_to({"0.6": {0: 0.0, 1: 2.0, 2: 1.0}}, {"0.6": {0: 0.0, 1: 1.0, 2: 0.5}})["0.6"]["seeds"] == 2  # one has it at KL 0
    spread = report.interval([0.4, 0.5, 0.6])
    assert spread["high"] - spread["mean"] == pytest.approx(4.302653 * 0.1 / 3**0.5)  # Student's t with two degrees of freedom


@pytest.mark.processes
def test_pairs_are_best_and_worst(tmp_path):
    texts = [(0, " was good ."), (0, " was bad ."), (0, " was awful ."), (1, " was good ."), (1, " was good ."), (2, "")]
    rows = [{"prompt": f"film {i}", "completion": text, "index": i} for i, text in texts]
    for split in ("train", "test"):
        (tmp_path / f"completions-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forked_script("experiments/frontier/pairs.py", str(tmp_path), "--margin", "0.1")
    (pair,) = [json.loads(line) for line in (tmp_path / "pairs" / "train.jsonl").read_text().splitlines()]
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("film 0", " was good .", " was awful .")
    assert pair["chosen_score"] > 0.6 > 0.4 > pair["rejected_score"]


@pytest.mark.processes
def test_whole_pipeline_at_a_small_size(monkeypatch, tmp_path):
    """One method, one seed: reward and KL rise, and the first point is the reference itself."""
    data = "datasets.reviews.n_train=320,datasets.reviews.n_test=32"
    small = [
        f"common=[model=tiny,'datasets=[reviews]',{data},eval_batch_size=64,n_eval_examples=32,sample_during_eval=false,wandb.enabled=false]"
    ]
    small += ["preference=[batch_size=32,eval_every=100000,do_first_eval=false,warmup_steps=3]"]
    small += [
        "examples=256",
        "completion_prompts=null",
        "completions=3",
        "sft=[n_epochs=6,lr=3e-3,batch_size=64,eval_every=100000]",
        "seeds=[0]",
        "betas=[0.1]",
        "lrs=[1e-3]",
        "shown={beta: 0.1, lr: 1e-3}",
        "checkpoints=2",
        "n_prompts=32",
    ]
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path), "--methods", "TDPO2 0.5", "--workers", "1", *small])
    frontier = module("run")
    monkeypatch.setattr(frontier, "run_script", forked_script)
    monkeypatch.setattr(sys.modules["experiments.jobs"], "run_script", forked_script)
    frontier.main()
    (measured,) = tmp_path.glob("tdpo2_0.5/*/measured.json")
    points = json.loads(measured.read_text())["points"]
    assert points[0]["samples/kl"] == pytest.approx(0, abs=1e-6) and points[0]["seqkl/chosen"] == pytest.approx(0, abs=1e-6)
    assert len(points) > 2 and points[-1]["samples/reward"] > points[0]["samples/reward"] + 0.1 and 0.05 < points[-1]["samples/kl"] < 20
    assert (tmp_path / "frontier.png").stat().st_size > 20_000
    last = points[-1]
    row = f"| TDPO2 0.5 | {last['samples/reward']:.3f}"
    assert row in (tmp_path / "table.md").read_text()
    # An interrupted run has a checkpoint that the others do not have.
    other = tmp_path / "tdpo2_0.5" / "beta0.1_lr0.001_seed1"
    other.mkdir()
    content = json.loads(measured.read_text())
    extra = {**last, "examples": last["examples"] - 1}
    (other / "measured.json").write_text(json.dumps({**content, "seed": 1, "points": [*points[:-1], extra, last]}))
    forked_script("experiments/frontier/report.py", str(tmp_path))
    spent = json.loads((tmp_path / "results.json").read_text())["kl_at_reward"]["TDPO2 0.5"]["0.6"]
    assert spent["0"] == pytest.approx(spent["1"]) and spent["0"] > 0
