"""Run a script of the repository, and stop it when the process that started it ends, even by SIGKILL.

    python experiments/supervised.py <process id of the starter> <script> [argument ...]

Otherwise the script would train on, and a second start of the experiment would meet it.
"""

import os
import runpy
import signal
import sys
import threading
import time

INTERVAL = 1.0  # seconds between two looks at the starter


def stop_with(starter: int) -> None:
    """Send this process SIGTERM, after which train.py saves a checkpoint, once the starter is no longer its parent."""
    while os.getppid() == starter:
        time.sleep(INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=stop_with, args=(int(sys.argv[1]),), daemon=True).start()
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
