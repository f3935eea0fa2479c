"""Measure whether the host memory of starting FSDPTrainer grows with the number of ranks on one machine (beyond their imports).

    python benchmarks/start_memory.py

The script creates a random GPT-NeoX of the given size and its policy.pt in a temporary folder, starts SFT and TDPO2 from it with 1 and 4
ranks, and sums the proportional set sizes of all processes until the first step would begin. Linux only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from tdpo.models.tokenizer import embedded_tokenizer  # noqa: E402

IMPORTS = "import sys, time; sys.path.insert(0, {root!r}); import train; print('ready', flush=True); time.sleep(600)"


def make_model(folder: Path, layers: int, hidden: int) -> int:
    """Write a Hugging Face folder `model` and a policy.pt. Returns the bytes of the model, which is in float32."""
    tokenizer = embedded_tokenizer()
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": 16}
    config = transformers.GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)
    model = transformers.GPTNeoXForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.save({"step_idx": 0, "state": model.state_dict(), "metrics": {}}, folder / "policy.pt")
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def proportional_set_size(root: int) -> int:
    """Return the bytes of a process and its descendants; shared pages count once."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
            children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
        except OSError:
            continue
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, IndexError):
            continue
    return total


def peak_until(line_has: str, arguments: list[str]) -> int:
    """Start a process, end it once its output contains `line_has`, and return its peak bytes until then."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        peak, printed = 0, ""
        while line_has not in printed:
            peak = max(peak, proportional_set_size(process.pid))
            output.seek(0)
            printed = output.read()
            if process.poll() is not None:
                raise SystemExit(printed[-3000:])
            time.sleep(0.02)
        process.terminate()
        process.wait()
    return peak


def measure(folder: Path, loss: str, ranks: int) -> int:
    """Return the peak bytes of a start above those of the same number of processes that only import."""
    command = [sys.executable, "-u", "-c", IMPORTS.format(root=str(ROOT))]
    imports = peak_until("ready", command)  # the same in every process
    options = [f"loss={loss}", f"nproc_per_node={ranks}", f"local_run_dir={folder}/{loss}-{ranks}", "trainer=FSDPTrainer"]
    options += [] if loss == "sft" else [f"model.archive={folder}/policy.pt"]
    options += ["model=blank_model", f"model.name_or_path={folder}/model", "exp_name=x", "debug=true", "wandb.enabled=false"]
    options += ["datasets.reviews.n_train=64", "datasets.reviews.n_test=8", "max_length=64", "max_prompt_length=16", "do_first_eval=false"]
    processes = ranks + (ranks > 1)  # the launcher too
    return peak_until("dropped at the end", [sys.executable, "-u", str(ROOT / "train.py"), *options]) - processes * imports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        size = make_model(Path(name), arguments.layers, arguments.hidden)
        print(f"model: {size / 1e9:.2f} GB; GB above ranks that only import")
        for loss in ("sft", "tdpo2"):
            peaks = {ranks: measure(Path(name), loss, ranks) for ranks in arguments.ranks}
            print(f"{loss}: " + ", ".join(f"{ranks} ranks {peak / 1e9:.2f}" for ranks, peak in peaks.items()))


if __name__ == "__main__":
    main()
