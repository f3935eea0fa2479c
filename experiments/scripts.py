"""Run the repository's scripts as subprocesses of an experiment, and forward signals to them: they save a checkpoint and exit."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, TextIO

ROOT = Path(__file__).resolve().parents[1]
_running: list[subprocess.Popen] = []
_sent: list[int] = []  # signals, in the order in which they were sent


def run_script(script: str, *arguments: str, output: Optional[TextIO] = None, environment: Optional[Mapping[str, str]] = None) -> int:
    """Run a script to its end and return its exit code, 128 + N if signal N ended it.

    Args:
        script: path within the repository.
        arguments: its command line.
        output: file for its stdout and stderr; None: those of this process.
        environment: its complete environment; None: that of this process.
    """
    supervised = [sys.executable, "-u", str(ROOT / "experiments" / "supervised.py"), str(os.getpid())]
    command = [*supervised, str(ROOT / script), *arguments]
    # In its own session: otherwise Ctrl-C would reach it twice (from the terminal and forwarded), and it would exit without a checkpoint.
    known = len(_sent)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True)
    for signum in _sent[known:]:  # sent while it was starting
        process.send_signal(signum)
    _running.append(process)
    try:
        code = process.wait()
    finally:
        _running.remove(process)
    return code if code >= 0 else 128 - code


def send_to_scripts(signum: int) -> None:
    """Send a signal to all running scripts."""
    _sent.append(signum)
    for process in tuple(_running):
        process.send_signal(signum)
