"""Runs train.py as tests/faults.py needs it: python constrained.py LIMIT ARGUMENT ...

LIMIT is the largest size of a file that the run may write, in bytes, which stands in for a full disk; 0: none. Data of any size are cached.
"""

import resource
import runpy
import signal
import sys
from pathlib import Path

import preference_datasets

if __name__ == "__main__":
    if limit := int(sys.argv[1]):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing raises an error instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    preference_datasets.TEXTS_A_CORE = 1
    script = str(Path(__file__).resolve().parents[2] / "train.py")
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")
