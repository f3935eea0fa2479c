"""experiments/hh: the pipeline from rows to the table at a tiny size, and its intervals, ties and checks by hand."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from helpers import MINI, ROOT, compose, forked_script
from omegaconf import OmegaConf

sys.path.insert(0, str(ROOT))

import eval as evaluate  # noqa: E402
import token_report  # noqa: E402
from experiments import jobs  # noqa: E402
from experiments.hh import report, run  # noqa: E402
from tdpo.cli.check_config import check_config  # noqa: E402
from tdpo.losses import get_objective  # noqa: E402
from tdpo.utils import UserError  # noqa: E402

TINY = [f"data={MINI}/data", "model=blank_model", f"model.name_or_path={MINI}/model", "methods=[DPO,IPO]"]
TINY += [
    "common=[max_length=64,max_prompt_length=32,eval_batch_size=8]",
    "preference=[lr=2e-3,warmup_steps=1,log_kl=true]",
    "sft=[lr=5e-4]",
]
TINY += ["batch_size=8", "sft_examples=16", "examples=16", "eval_every=8", "eval_examples=8"]
TINY += ["n_pairs=12", "n_prompts=4", "n=2", "token_pairs=2"]


def task_in(folder, *settings: str):
    return run.task_of([*TINY, f"out={folder}", *settings])


# --- the whole pipeline ---

TOOLS = {"eval.py": evaluate, "token_report.py": token_report}


class Scripts:
    """Runs train.py forked, and what needs no signals in this process, which is faster; notes what was run."""

    def __init__(self, breaks=None):
        self.breaks, self.ran = breaks, []  # breaks: called with the log after train.py of IPO, which then counts as failed

    def __call__(self, script, *arguments, output=None, environment=None) -> int:
        name = next((part for part in ("dpo", "ipo", "sft") if any(f"/seed0/{part}'" in argument for argument in arguments)), "")
        self.ran.append(f"{script} {name}".strip())
        if script == "experiments/hh/report.py":
            report.write(Path(*arguments))
        elif script in TOOLS:
            TOOLS[script].run(compose(*arguments, name=script.removesuffix(".py")))
        else:
            forked_script(script, *arguments, output=output, environment=environment)
            if self.breaks and name == "ipo":
                self.breaks(output.name)
                return 1
        return 0


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """The folder of an experiment whose IPO run is killed after its first checkpoint and then resumed by the same command; per start the
    scripts that ran, the exit, and the content of results.json and table.md."""
    folder = tmp_path_factory.mktemp("hh")
    starts = []

    def killed(log: str) -> None:
        shutil.rmtree(folder / "seed0" / "ipo" / "step-16")
        with open(log, "a") as file:
            file.write("\nerror: out of memory: as if\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", *TINY, f"out={folder}"])
        for breaks in (killed, None):
            scripts = Scripts(breaks)
            patch.setattr(jobs, "run_script", scripts)
            patch.setattr(run, "run_script", scripts)
            try:
                run.main()
                exit = None
            except SystemExit as error:
                exit = error.code
            starts.append((scripts.ran, exit, json.loads((folder / "results.json").read_text()), (folder / "table.md").read_text()))
    return folder, starts


pipeline = pytest.mark.processes


@pipeline
def test_from_rows_to_the_table(experiment):
    folder, ((ran, _, _, _), (_, exit, results, table)) = experiment
    assert exit is None and results["missing"] == {} and list(results["methods"]) == ["SFT", "DPO", "IPO"]
    assert ran[:3] == ["train.py sft", "eval.py sft", "experiments/hh/report.py"]
    for name, method in results["methods"].items():
        measured = json.loads((folder / "seed0" / name.lower() / "eval.json").read_text())
        (own,) = measured["results"].values()
        for measure, value in method["measures"].items():
            assert [value[key] for key in ("mean", "low", "high", "n")] == [
                own[measure][key] for key in ("mean", "low", "high", "examples")
            ]
        assert method["measures"]["samples/entropy"]["n"] == 4 and method["seeds"] == [0]
        assert method["runs"]["0"]["train_examples"] == 16
    assert results["settings"]["model"] == ["model=blank_model", "model.name_or_path=model"]  # no path of this machine
    dpo = results["methods"]["DPO"]
    assert dpo["measures"]["accuracy/logit"]["n"] == 12 and dpo["measures"]["seqkl/chosen"]["mean"] > 0.01
    assert "accuracy/logratio" not in results["methods"]["SFT"]["measures"] and results["methods"]["SFT"]["runs"]["0"]["start"] is None
    assert dpo["runs"]["0"]["start"]["loss"] == pytest.approx(math.log(2)) and dpo["runs"]["0"]["start"]["ok"]
    assert results["methods"]["IPO"]["runs"]["0"]["start"]["loss"] == pytest.approx(25.0)
    for measure in ("accuracy/logratio", "samples/entropy"):
        assert report.cell(dpo["measures"][measure]) in next(line for line in table.splitlines() if line.startswith("| DPO |"))
    assert dpo["runs"]["0"]["findings"][0]["text"] in table
    for file in ("curves.png", "seed0/dpo/curves.html", "seed0/dpo/tokens.html", "seed0/ipo/tokens.html"):
        assert (folder / file).stat().st_size > 5000


@pipeline
def test_a_failed_loss_does_not_stop_the_others_and_is_named(experiment):
    _, ((ran, exit, results, table), _) = experiment
    assert results["missing"] == {"IPO, seed 0": "failed: out of memory: as if"} and "IPO, seed 0: failed: out of memory: as if" in table
    assert "1 step failed" in exit and "seed0_ipo_train:" in exit and "error: out of memory: as if" in exit
    assert "eval.py ipo" not in ran and "eval.py dpo" in ran and "DPO" in results["methods"]


@pipeline
def test_the_same_command_continues_without_retraining(experiment):
    folder, (_, (ran, exit, _, _)) = experiment
    assert ran == ["train.py ipo", "eval.py ipo", "token_report.py ipo", "experiments/hh/report.py", "experiments/hh/report.py"]
    log = (folder / "logs" / "seed0_ipo_train.log").read_text()
    assert "resumed from" in log and "step-8: 8 examples trained on so far" in log
    task = task_in(folder)
    assert run.progress_of(task) == run.total_of(task) == 3 * (16 + 12 + 4 * 2)
    assert all(run.job(task, name, 0) == [] for name in ("SFT", "DPO", "IPO"))


@pipeline
def test_other_settings_do_not_continue_a_folder(experiment):
    folder, _ = experiment
    with pytest.raises(UserError, match="begun with examples=16, which is 24 here: give that value, or another out="):
        run.begin(task_in(folder, "examples=24"))
    other = task_in(folder)
    other.methods.DPO = "loss=dpo loss.beta=0.5"
    with pytest.raises(UserError, match="begun with DPO as 'loss=dpo'"):
        run.begin(other)
    before = (folder / "task.yaml").read_text()
    run.begin(task_in(folder, "methods=[DPO]"))
    assert (folder / "task.yaml").read_text() == before


def test_an_unfinished_run_has_its_remaining_steps(tmp_path):
    """An empty eval.json is that of an interrupted eval."""
    task, kinds = task_in(tmp_path), lambda: [step.name.rpartition("_")[2] for step in run.job(task, "DPO", 0)]
    assert kinds() == ["train", "eval", "tokens", "report"] and [step.required for step in run.job(task, "DPO", 0)][:2] == [True, False]
    (tmp_path / "seed0" / "dpo" / "LATEST" / "hf").mkdir(parents=True)
    (tmp_path / "seed0" / "dpo" / "eval.json").touch()
    assert kinds() == ["eval", "tokens", "report"]
    (tmp_path / "seed0" / "dpo" / "eval.json").write_text("{}")
    assert kinds() == ["tokens", "report"]


def test_progress_counts_pairs_and_texts(tmp_path):
    """KTO counts two examples as one pair."""
    task = task_in(tmp_path, "methods=[DPO,KTO]")
    assert run.total_of(task) == 3 * (16 + 12 + 8)
    for name in ("dpo", "kto"):
        (tmp_path / "seed0" / name).mkdir(parents=True)
        log = {"split": "train", "counters/examples": 8}
        (tmp_path / "seed0" / name / "metrics.jsonl").write_text(json.dumps(log) + "\n")
    (tmp_path / "seed0" / "dpo" / "eval.json").write_text("{}")
    assert run.progress_of(task) == (8 + 12 + 8) + 4


# --- command lines ---


@pytest.mark.parametrize("size", ["small", "paper"])
def test_every_run_of_a_size_composes(size):
    task = run.task_of([f"size={size}", "data=/data/hh"] if size == "small" else [f"size={size}"])
    configs = {}
    for name in (run.SFT, *task.methods):
        overrides = run.overrides_of(task, name, 0)
        configs[name] = check_config(compose(*overrides), overrides).config
    losses = {name: config.loss.name for name, config in configs.items()}
    assert losses == {
        "SFT": "sft",
        "f-DPO forward KL": "f_dpo",
        "f-DPO Jensen-Shannon": "f_dpo",
        "DPO": "dpo",
        "IPO": "ipo",
        "KTO": "kto",
        "TDPO1": "tdpo1",
        "TDPO2": "tdpo2",
    }
    assert [configs[f"f-DPO {name}"].loss.divergence for name in ("forward KL", "Jensen-Shannon")] == ["forward_kl", "jensen_shannon"]
    assert all(config.loss.beta == 0.1 for name, config in configs.items() if name != "SFT") and configs["TDPO2"].loss.alpha == 0.5
    for key in ("batch_size", "n_examples", "eval_every"):  # KTO trains on two responses of each of the pairs
        assert configs["KTO"][key] == (configs["DPO"][key] and 2 * configs["DPO"][key]), key
    dpo, sft = configs["DPO"], configs["SFT"]
    assert dpo.model.archive == f"{task.out}/seed0/sft" == sft.local_run_dir and sft.model.archive is None and dpo.log_kl
    if size == "paper":
        assert (dpo.batch_size, dpo.lr, dpo.warmup_steps, dpo.optimizer, dpo.trainer) == (64, 5e-6, 150, "RMSprop", "FSDPTrainer")
        assert dpo.n_epochs == 3 and sft.n_epochs == 1 and dpo.n_examples is None and dpo.model.name_or_path == "EleutherAI/pythia-2.8b"
        assert dpo.datasets.hh.path == "Anthropic/hh-rlhf" and dpo.max_length == 512
    else:
        assert (dpo.batch_size, dpo.n_examples, dpo.n_epochs, dpo.datasets.hh.path) == (8, 400, None, "/data/hh")


def test_the_model_of_the_command_line():
    small = ["model=smollm2", "model.fsdp_policy_mp=bfloat16"]
    assert run.task_of(["data=x", "model.name_or_path=/m"]).model == [*small, "model.name_or_path=/m"]
    assert run.task_of(["data=x", "model.add_bos=true", "model=pythia160m"]).model == ["model=pythia160m", "model.add_bos=true"]


def test_a_dtype_that_is_slow_on_this_processor_is_told_before_the_first_run(tmp_path, capsys, monkeypatch):
    """And what is told as the remedy computes in float32, in the folder that it names."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True}, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    slow = task_in(tmp_path / "slow", "model.fsdp_policy_mp=bfloat16")
    run.check(slow)
    said = capsys.readouterr().err
    assert said.count("warning: bfloat16 is no faster than float32 on this processor") == 1 and "another out=" in said
    remedy = [word.strip(",") for word in said.split() if word.startswith("model.")]
    assert remedy == ["model.fsdp_policy_mp=null", "model.policy_dtype=float32"]
    run.begin(slow)
    with pytest.raises(UserError, match="or another out="):
        run.begin(task_in(tmp_path / "slow", "model.fsdp_policy_mp=bfloat16", *remedy))
    mended = task_in(tmp_path / "mended", "model.fsdp_policy_mp=bfloat16", *remedy)
    run.check(mended)
    run.begin(mended)
    assert capsys.readouterr().err == ""


def test_error_messages(tmp_path):
    with pytest.raises(UserError, match=r"unknown key exampels \(did you mean examples\?\); the keys are data, "):
        run.task_of(["exampels=3"])
    with pytest.raises(UserError, match="size=huge is unknown: the sizes are small, paper"):
        run.task_of(["size=huge"])
    with pytest.raises(UserError, match="methods=.*: give a list of some of f-DPO forward KL.*such as methods="):
        run.task_of(["methods=[DPO,PPO]"])
    with pytest.raises(UserError, match=r"seeds=1: give a list, as in seeds=\[1\]"):
        run.task_of(["seeds=1"])
    with pytest.raises(UserError, match="examples=some: give an integer, as in examples=400"):
        run.task_of(["examples=some"])
    with pytest.raises(UserError, match="missing: data=<folder with train.jsonl and test.jsonl"):
        run.check(run.task_of([]))
    with pytest.raises(UserError, match="nowhere"):
        run.check(task_in(tmp_path, f"data={tmp_path}/nowhere"))
    with pytest.raises(UserError, match="DPO: unknown key lrr"):
        run.check(task_in(tmp_path, "preference=[lrr=1e-4]"))
    assert not list(tmp_path.iterdir())


# --- intervals, ties and the first step, by hand ---


def value(mean: float, low: float, high: float) -> dict:
    return {"mean": mean, "low": low, "high": high, "n": 9, "over": "prompts"}


def test_the_interval_of_one_seed_is_over_prompts_and_of_several_over_seeds():
    one = {"mean": 0.4, "low": 0.1, "high": 0.9, "examples": 12}
    assert report.over_seeds([one]) == {"mean": 0.4, "low": 0.1, "high": 0.9, "n": 12, "over": "prompts"}
    three = report.over_seeds([one, {**one, "mean": 0.5}, {**one, "mean": 0.6}])
    assert (three["mean"], three["n"], three["over"]) == (pytest.approx(0.5), 3, "seeds")
    assert three["high"] - 0.5 == pytest.approx(0.5 - three["low"]) == pytest.approx(4.302653 * 0.1 / 3**0.5)  # Student's t, two degrees
    assert report.over_seeds([one, {**one, "mean": None}]) == {"mean": None, "low": None, "high": None, "n": 2, "over": "seeds"}
    assert report.cell(report.over_seeds([one, {**one, "mean": None}])) == "-"


def test_overlapping_intervals_are_ties():
    some = {"A": value(1, 0.9, 1.1), "B": value(2, 1.5, 2.5), "C": value(2.4, 1.1, 3), "D": None, "E": value(9, None, None)}
    compared = report.compare(some)
    assert compared["apart"] == [["B", "A"]]  # C begins where A ends: a tie
    assert compared["ties"] == [["A", "C"], ["A", "E"], ["B", "C"], ["B", "E"], ["C", "E"]]
    assert report.differences(compared) == "B above A; all others tie"
    assert (
        report.differences(report.compare({"A": value(3, 2, 4), "B": value(1, 0, 1), "C": value(0, 0, 1)}))
        == "A above B, C; all others tie"
    )
    assert report.differences({"apart": [], "ties": [["A", "B"]]}) == "all tie"
    assert report.differences({"apart": [["A", "B"]], "ties": []}) == "A above B"
    assert report.differences({"apart": [], "ties": []}) == "nothing to compare"


@pytest.mark.parametrize(
    "loss,options,expected",
    [
        ("dpo", {"beta": 0.1}, math.log(2)),
        ("f_dpo", {"beta": 0.1, "divergence": "forward_kl"}, math.log(2)),
        ("f_dpo", {"beta": 0.1, "divergence": "jensen_shannon"}, math.log(2)),
        ("tdpo1", {"beta": 0.1}, math.log(2)),
        ("tdpo2", {"beta": 0.1, "alpha": 0.5}, math.log(2)),
        ("ipo", {"beta": 0.1}, 25.0),
        ("kto", {"beta": 0.1, "undesirable_weight": 3.0}, 1.0),
    ],
)
def test_the_loss_of_equal_models(loss, options, expected):
    assert report.loss_of_equals(get_objective(loss, **options)) == pytest.approx(expected)


def test_the_first_step_tells_whether_policy_and_reference_are_equal():
    objective = get_objective("tdpo2", beta=0.1, alpha=0.5)
    first = {"split": "train", "counters/updates": 1, "counters/examples": 8, "loss/train": math.log(2)}
    first |= {"rewards_train/chosen": 0.0, "rewards_train/rejected": -4e-5, "rewards_train/accuracies": 1.0, "kl_train/chosen": 0.0}
    first |= {"kl_train/rejected": 0.0, "rewards_train/margins": 4e-5}
    later = {**first, "counters/updates": 2, "loss/train": 0.5}
    start = report.first_step(objective, [{"split": "eval", "counters/examples": 0, "loss/eval": 0.9}, first, later])
    assert start == {
        "loss": pytest.approx(math.log(2)),
        "expected_loss": pytest.approx(math.log(2)),
        "reward": pytest.approx(4e-4),  # nats: divided by beta
        "seqkl": 0.0,
        "ok": True,
    }
    for change in ({"loss/train": 0.7}, {"rewards_train/chosen": 2e-4}, {"kl_train/rejected": 2e-3}, {"kl_train/chosen": None}):
        assert not report.first_step(objective, [{**first, **change}])["ok"], change
    assert report.first_step(objective, [later]) is None


def test_the_table_is_made_of_the_results_alone():
    measures = {"accuracy/logratio": value(0.61, 0.55, 0.67), "samples/entropy": {**value(2.5, 2.4, 2.6), "n": 4}}
    start = {"loss": 0.7, "expected_loss": 0.6931, "reward": None, "seqkl": 0.0, "ok": False}
    findings = [{"concern": True, "text": "SeqKL rose."}, {"concern": False, "text": "Fine."}]
    dpo = {"seeds": [3], "measures": measures, "runs": {"3": {"train_examples": 1400, "start": start, "findings": findings}}}
    results = {
        "settings": {},
        "meanings": {"samples/entropy": "meaning"},
        "methods": {"DPO": dpo},
        "missing": {"IPO, seed 3": "not run yet"},
    }
    results["comparisons"] = {name: report.compare({"DPO": measures.get(name)}) for names in report.TABLES.values() for name in names}
    table = report.table_of(results).splitlines()
    assert "| DPO | 0.610 [0.550, 0.670] | - | - | 2.500 [2.400, 2.600] | - |" in table
    assert "- DPO: 1,400 train examples, seed 3; intervals over 9 held-out prompts of pairs and 4 held-out prompts of samples" in table
    assert "- IPO, seed 3: not run yet" in table and "| DPO, seed 3 | 0.7000 | 0.6931 | not finite | 0.0000 | **no** |" in table
    assert "  - ! SeqKL rose." in table and "  - Fine." in table


def test_what_became_of_a_run(tmp_path):
    task = OmegaConf.create({"out": str(tmp_path)})
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "seed1_kto_train.log"
    assert report.fate(task, "KTO", 1) == "not run yet"
    log.write_text("step 1\nstep 2\n")
    assert report.fate(task, "KTO", 1) == "not finished"
    log.write_text("Traceback\nKeyError: 'x'\n")
    assert report.fate(task, "KTO", 1) == "stopped in 'logs/seed1_kto_train.log': KeyError: 'x'"
    (tmp_path / "logs" / "seed1_kto_eval.log").write_text("error: run=x is gone\n")
    assert report.fate(task, "KTO", 1) == "failed: run=x is gone"
