"""Scripts of the repository as processes of an experiment, to which signals go on: they save, and end."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, TextIO

ROOT = Path(__file__).resolve().parents[1]
_running: list[subprocess.Popen] = []


def run_script(script: str, *arguments: str, output: Optional[TextIO] = None, environment: Optional[Mapping[str, str]] = None) -> int:
    """Run a script to its end; its exit code, as a shell would give it.

    Args:
        script: its path within the repository.
        output: where it prints to; None: where this process does.
        environment: its whole environment; None: this process's.
    """
    command = [sys.executable, "-u", str(ROOT / script), *arguments]
    # A session of its own: else Ctrl-C would reach it twice, which ends it without a checkpoint.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True)
    _running.append(process)
    try:
        code = process.wait()
    finally:
        _running.remove(process)
    return code if code >= 0 else 128 - code


def send_to_scripts(signum: int) -> None:
    """Send a signal to the scripts that run now."""
    for process in tuple(_running):
        process.send_signal(signum)
