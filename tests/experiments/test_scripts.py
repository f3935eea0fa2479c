"""experiments/scripts.py and its users: stop signals reach the scripts that run, and end the experiment."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT, wait_for

sys.path.insert(0, str(ROOT))

from experiments import jobs, scripts  # noqa: E402
from tdpo.distributed.signals import forwarded  # noqa: E402

# Writes the signal that it gets into the file that is its argument, and exits with 7.
SLEEPER = """
import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda number, frame: (out.write_text(str(number)), sys.exit(7)))
out.touch()
time.sleep(60)
"""


@pytest.mark.processes
def test_a_signal_reaches_a_running_script_and_its_exit_code_is_returned(tmp_path):
    script, out = tmp_path / "sleeper.py", tmp_path / "out"
    script.write_text(SLEEPER)

    def tell() -> None:
        wait_for(out.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=tell).start()
    with forwarded(scripts.send_to_scripts) as received:
        assert scripts.run_script(str(script), str(out)) == 7
    assert received == [signal.SIGTERM] and out.read_text() == str(int(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is before and scripts._running == []


@pytest.mark.processes
def test_a_script_that_dies_of_a_signal_has_the_exit_code_of_a_shell(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os; os.kill(os.getpid(), 9)")
    assert scripts.run_script(str(script)) == 137


@pytest.mark.processes
def test_a_signal_while_a_script_starts_is_sent_to_it(tmp_path, monkeypatch):
    """The signal comes before the script is known to be running."""
    script, start = tmp_path / "waits.py", scripts.subprocess.Popen
    script.write_text("import time; time.sleep(60)")

    def started(*arguments, **options):
        process = start(*arguments, **options)
        scripts.send_to_scripts(signal.SIGTERM)
        return process

    monkeypatch.setattr(scripts.subprocess, "Popen", started)
    assert scripts.run_script(str(script)) == 128 + signal.SIGTERM


def test_a_signal_ends_the_jobs_before_its_next_step(tmp_path, monkeypatch, capsys):
    """Also if the step under way has ended well; the exit code is the signal's."""
    done = []

    def told(script, *arguments, **options):
        done.append(script)
        known = len(scripts._sent)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: len(scripts._sent) > known)  # the main thread has noted it
        return 0

    monkeypatch.setattr(jobs, "run_script", told)
    (tmp_path / "logs").mkdir()
    both = [[jobs.Step("a", ["a.py"]), jobs.Step("b", ["b.py"])], [jobs.Step("c", ["c.py"])]]
    with pytest.raises(SystemExit) as ended:
        jobs.run_jobs("test", both, 1, tmp_path, [], 0)
    assert ended.value.code == 128 + signal.SIGUSR1 and done == ["a.py"] and "the same command continues" in capsys.readouterr().err


def test_a_required_step_that_fails_ends_its_job_alone(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(jobs, "run_script", lambda script, *arguments, **options: done.append(script) or script in ("a.py", "c.py"))
    (tmp_path / "logs").mkdir()
    first = [jobs.Step("a", ["a.py"], required=True), jobs.Step("b", ["b.py"])]
    failed = jobs.run_jobs("test", [first, [jobs.Step("c", ["c.py"]), jobs.Step("d", ["d.py"])]], 1, tmp_path, lambda: len(done), 4)
    assert done == ["a.py", "c.py", "d.py"] and failed == ["a", "c"]


def test_progress_is_told_in_lines_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    """Tell a change below a fiftieth of the total, here from 2 to 3 of 100, together with the next one."""
    counts, progress = [1, 8, 38], [2]
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: progress.append(2 + counts.pop(0)) if counts else None)
    monkeypatch.setattr(jobs, "time", clock)
    monkeypatch.setattr(jobs, "run_script", lambda *arguments, **options: wait_for(lambda: not counts) or 0)
    (tmp_path / "logs").mkdir()
    assert jobs.run_jobs("Runs", [[jobs.Step("a", ["a.py"])]], 1, tmp_path, lambda: progress[-1], 100) == []
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(", ")[0] for line in lines] == ["Runs: 10 of 100", "Runs: 40 of 100"] and all(
        line.endswith(" left") for line in lines
    )


def test_the_share_of_a_worker(monkeypatch):
    """All GPUs for one worker, and at least one for each of several."""
    monkeypatch.setattr(jobs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    share = {n: [jobs.environment_of(i, n)["CUDA_VISIBLE_DEVICES"] for i in range(n)] for n in (1, 2, 3, 5)}
    assert share == {1: ["4,5,6"], 2: ["4,6", "5"], 3: ["4", "5", "6"], 5: ["4", "5", "6", "4", "5"]}


def test_a_signal_ends_self_play_after_a_script_that_ended_well(monkeypatch):
    from experiments import spin

    monkeypatch.setattr(spin, "run_script", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM) or 0)
    with pytest.raises(SystemExit) as ended:
        spin.call("train.py")
    assert ended.value.code == 128 + signal.SIGTERM


# Starts a script as an experiment does; prints the script's process id.
STARTER = """
import signal
import sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests are started with nohup
sys.path.insert(0, sys.argv[1])
from experiments import scripts
scripts.run_script(sys.argv[2], sys.argv[3])
"""


@pytest.mark.processes
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGHUP])
def test_a_script_stops_when_its_experiment_is_killed(signum, tmp_path):
    script, starter, out = tmp_path / "sleeper.py", tmp_path / "starter.py", tmp_path / "out"
    script.write_text(SLEEPER)
    starter.write_text(STARTER)
    process = subprocess.Popen([sys.executable, str(starter), str(ROOT), str(script), str(out)], start_new_session=True)
    wait_for(out.exists)
    process.send_signal(signum)
    process.wait()
    wait_for(lambda: out.read_text() == str(int(signal.SIGTERM)), 10)
    wait_for(lambda: not subprocess.run(["pgrep", "-f", str(out)], capture_output=True).stdout, 10)
