"""benchmarks/gpu.py: all its stages on a CPU, and what it makes of stages that fail, hang or die."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from benchmarks import gpu
from benchmarks.gpu_stages import bench, scorers, speed, updates
from benchmarks.gpu_stages.rows import Check, Measurement, Sizes, Skip, attempted, distance, judged, largest

MEASURED = {
    "attention: error to float64",
    "attention: new length",
    "compiled graphs",
    "waits of a step",
    "ceilings",
    "head and loss",
    "step",
    "ways",
    "Llama-3-8B by layers",
}


INTERRUPTED = """
import sys, time
from benchmarks import gpu
from benchmarks.gpu_stages.rows import judged

def hangs(sizes, device):
    yield judged("before", True)
    time.sleep(60)

stages = [gpu.Stage("hangs", hangs, 60), gpu.Stage("last", hangs, 60)]
sys.exit(gpu.main(["--device", "cpu", "--small", "--out", sys.argv[1]], stages))
"""


def one_row(sizes, device):
    yield judged("one", True, "1 = 1")


def measures(sizes, device):
    yield Measurement("numbers", {"what": "a", "value": 1})


def raises(sizes, device):
    yield judged("before", True)
    print("printed")
    raise ValueError("first line\nsecond line")


def hangs(sizes, device):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # started-by-a-stage"])
    yield judged("before", True)
    time.sleep(600)


def dies(sizes, device):
    yield judged("before", True)
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(sizes, device):
    yield judged("before", True)
    os._exit(3)


def is_wrong(sizes, device):
    yield judged("two", True)
    yield judged("three", False, "2 is not 3")


def has_nothing(sizes, device):
    raise Skip("needs peft")


def lacks_cuda(sizes, device):
    yield Check("four", "skipped", "needs CUDA")


def checked(tmp_path, stages: dict, *arguments: str) -> tuple[int, dict[str, dict]]:
    """Run stages, given as {name: (function, limit)}; return the exit code, and the outcomes by stage."""
    given = [gpu.Stage(name, function, limit) for name, (function, limit) in stages.items()]
    code = gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path), *arguments], given)
    return code, {outcome["stage"]: outcome for outcome in json.loads((tmp_path / "gpu.json").read_text())["stages"]}


@pytest.mark.processes
def test_all_stages_run_on_a_cpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small", "--out", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [outcome["stage"] for outcome in whole["stages"]] == [stage.name for stage in gpu.STAGES]
    assert all(outcome["state"] == "ok" for outcome in whole["stages"]), whole["stages"]
    assert {row["table"] for row in whole["rows"]} == {*MEASURED, "machine"}
    reasons = {check["detail"] for check in whole["checks"] if check["state"] == "skipped"}
    assert reasons <= {"needs CUDA", "needs trl", "needs trl, accelerate"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "gpu.jsonl").read_text().splitlines()]
    assert len(lines) == len(whole["rows"]) + len(whole["checks"]) + len(whole["stages"])
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert done.stdout.strip() == text.strip() and len(text) < 12_000
    assert all(f"## {name[0].upper()}{name[1:]}\n" in text for name in MEASURED)


@pytest.mark.processes
def test_a_stage_that_fails_leaves_the_others_running(tmp_path, capsys):
    bad = {"raises": raises, "dies": dies, "leaves": leaves, "wrong": is_wrong}
    stages = {"first": (one_row, 60), **{name: (function, 60) for name, function in bad.items()}, "hangs": (hangs, 1)}
    stages |= {"nothing": (has_nothing, 60), "cuda": (lacks_cuda, 60), "last": (measures, 60)}
    code, outcomes = checked(tmp_path, stages)
    assert code == 1
    assert {name: (outcome["state"], outcome["detail"]) for name, outcome in outcomes.items()} == {
        "first": ("ok", ""),
        "raises": ("failed", "ValueError: first line"),
        "dies": ("failed", "it died by SIGSEGV"),
        "leaves": ("failed", "it exited with code 3 before its end"),
        "wrong": ("failed", "1 of 2 checks: three: 2 is not 3"),
        "hangs": ("failed", "it did not end within 1 s"),
        "nothing": ("skipped", "needs peft"),
        "cuda": ("skipped", "needs CUDA"),
        "last": ("ok", ""),
    }
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines if line["kind"] == "check" and line["name"] == "before"} == {
        "raises",
        "dies",
        "leaves",
        "hangs",
    }
    log = (tmp_path / "raises.log").read_text()
    assert "printed" in log and "Traceback" in log
    assert "Segmentation fault" in (tmp_path / "dies.log").read_text() and "in hangs" in (tmp_path / "hangs.log").read_text()
    out = capsys.readouterr().out
    assert "| wrong | three | **FAILED** | 2 is not 3 |" in out and "## Numbers" in out and "printed" not in out
    assert not subprocess.run(["pgrep", "-f", "started-by-a-stage"], capture_output=True, text=True).stdout


@pytest.mark.processes
def test_stages_for_which_there_is_no_time_are_skipped(tmp_path):
    stages = {"first": (one_row, 60), "long": (hangs, 60), "last": (one_row, 60)}
    code, outcomes = checked(tmp_path, stages, "--minutes", "0.03")
    assert code == 0 and outcomes["first"]["state"] == "ok"
    assert (outcomes["last"]["state"], outcomes["last"]["detail"]) == ("skipped", "time")
    assert outcomes["long"]["state"] == "skipped" and outcomes["long"]["detail"].startswith("time")


@pytest.mark.processes
def test_stages_are_chosen_and_timed_by_arguments(tmp_path):
    stages = {"first": (one_row, 60), "second": (hangs, 60), "third": (one_row, 60)}
    code, outcomes = checked(tmp_path, stages, "--only", "third, second", "--timeout", "1")
    assert code == 1 and list(outcomes) == ["second", "third"] and outcomes["second"]["detail"] == "it did not end within 1 s"


def test_stages_are_chosen_by_group():
    both = [gpu.chosen(gpu.STAGES, group) for group in ("checks", "speed")]
    assert sorted(stage.name for group in both for stage in group) == sorted(stage.name for stage in gpu.STAGES)
    assert [stage.name for stage in both[1]] == ["ceilings", "step", "head speed", "ways", "lora", "blocks"]
    assert [stage.name for stage in gpu.chosen(gpu.STAGES, "speed, environment")][:2] == ["environment", "ceilings"]


@pytest.mark.processes
def test_a_check_that_is_interrupted_leaves_its_report(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines = tmp_path / "gpu.jsonl"
    while process.poll() is None and not (lines.exists() and "before" in lines.read_text()):
        time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "# GPU check" in out
    whole = json.loads((tmp_path / "gpu.json").read_text())
    assert [(each["stage"], each["state"], each["detail"]) for each in whole["stages"]] == [
        ("hangs", "skipped", "interrupted"),
        ("last", "skipped", "interrupted"),
    ]
    assert [check["name"] for check in whole["checks"]] == ["before"]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--only", "attention,heads"], "argument --only: there is no stage 'heads'; there are environment, attention,"),
        (["--minutes", "0"], "argument --minutes: '0' is not a number above 0"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--smal", "--x"], "unrecognized arguments: --x"),
    ],
)
def test_a_wrong_argument_ends_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        gpu.main(arguments)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out and len(err.splitlines()) == 1 and message in err


def test_a_long_report_is_cut(tmp_path, monkeypatch):
    report = gpu.Report(tmp_path, {"card": "none"})
    for i in range(300):
        report.add("many", judged(f"check {i}", i % 2 == 0, "x" * 100))
    report.end(gpu.Outcome("many", "failed", "", 1.0))
    text = report.finish()
    assert len(text) < 12_000 and text.endswith("The rest is in gpu.json.\n") and "check 1 |" in text and "check 0 |" not in text
    assert len(json.loads((tmp_path / "gpu.json").read_text())["checks"]) == 300


def test_a_number_that_is_not_finite_fails_a_check():
    nan, values = math.nan, torch.tensor([1.0, math.inf])
    assert all(math.isnan(largest(numbers)) for numbers in ([nan, 1.0], [1.0, nan, 2.0])) and largest(x for x in (1.0, 3.0, 2.0)) == 3.0
    assert math.isnan(distance(values, torch.ones(2))) and math.isnan(distance(torch.ones(2), values))
    check = speed.results_check("a", [bench.Result(1.0, nan)], [bench.Result(1.0, 1.0)], 0.1)
    assert check.state == "failed" and "losses 0.0e+00 and gradient norms nan apart" in check.detail


def test_a_step_whose_loss_or_norm_is_not_finite_raises():
    class Step:
        def __init__(self, loss: float, norm: float):
            self.loss, self.norm = loss, torch.tensor(norm)

        def __call__(self) -> float:
            return self.loss

    steps = bench.Rotation([Step(1.0, 2.0), Step(math.nan, 1.0)])
    assert steps() == 1.0
    with pytest.raises(RuntimeError, match="loss is not finite"):
        steps()
    with pytest.raises(RuntimeError, match="gradient norm is not finite"):
        bench.Rotation([Step(1.0, math.inf)])()
    assert steps.results == [bench.Result(1.0, 2.0)]


def test_kernels_in_a_step_of_an_optimizer_are_its_own():
    def event(name: str, start: float, end: float, mark: bool = False):
        time_range = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, time_range=time_range, is_user_annotation=mark)

    events = [event("nvjet_gemm", 0, 4000), event("elementwise", 5000, 6000), event("elementwise", 7000, 9000)]
    times, whole = bench.by_kind([*events, event("Optimizer.step#RMSprop.step", 6500, 9500, mark=True)])
    assert times == {"attention": 0, "matrix products": 4, "optimizer": 2, "copies": 0, bench.OTHER: 1} and whole == 9


def test_a_part_that_fails_keeps_no_tensors():
    frames = []

    def rows():
        held = torch.ones(3)
        try:
            raise KeyError("first")
        except KeyError as first:
            frames.append(first)
            raise ValueError("second") from first
        yield held

    (check,) = attempted("part", rows)
    assert check == Check("part", "failed", "ValueError: second") and frames[0].__traceback__ is None


def test_gemma2_with_attention_of_its_own_is_compared_in_float32():
    checks = list(scorers.compared("gemma2", torch.device("cpu")))
    assert [check.state for check in checks] == ["ok"] * 3, checks
    assert checks[0].name == "gemma2: float32 as float32 on the CPU"


def test_an_optimizer_without_a_step_fails_alone(monkeypatch):
    whole = updates.after_steps

    def after_steps(name, parameters, options, device):
        if name == "Adagrad" and options.get("fused"):
            raise NotImplementedError("no kernel")
        return whole(name, parameters, options, device)

    monkeypatch.setattr(updates, "after_steps", after_steps)
    checks = list(updates.stage(Sizes.small(), torch.device("cpu")))
    failed = [check for check in checks if check.state == "failed"]
    assert [check.name for check in failed] == ["Adagrad, fused=True"] and "lacks this step on cpu" in failed[0].detail
    assert "Adagrad, foreach=True: as the plain loop" in [check.name for check in checks if check.state == "ok"]


@pytest.mark.gpu
def test_the_check_passes_on_a_gpu(request, tmp_path):
    """Ten minutes on a card, and therefore only where it is asked for: pytest -m gpu."""
    if not torch.cuda.is_available() or "gpu" not in request.config.option.markexpr:
        pytest.skip("needs a GPU, and -m gpu")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--minutes", "9.5", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=620)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
