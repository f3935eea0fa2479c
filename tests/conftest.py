"""What the tests share. No network: models are built from their configs, data are local files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: nothing waits for a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

import train  # noqa: E402
from tdpo.data.contract import PAIRS, SFT, examples_in_form  # noqa: E402
from tdpo.data.split import TokenizedSplit  # noqa: E402
from tdpo.data.token_cache import tokenize  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

MINI = ROOT / "tests" / "golden" / "mini"

# Small runs on the rows of tests/golden: SFT, and TDPO2 from recorded weights.
DATA = ["model=blank_model", f"model.name_or_path={MINI}/model", "datasets=[hh]", f"datasets.hh.path={MINI}/data"]
DATA += ["max_length=64", "max_prompt_length=32", "batch_size=8", "lr=5e-4", "warmup_steps=3"]
PREFERENCE = [*DATA, "loss=tdpo", f"model.archive={MINI}/sft_policy.pt"]

# Small models of the families in config/model.
SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
FAMILIES = {
    "gpt2": {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "gptj": {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "rotary_dim": 4},
    "gpt_neox": SIZES,
    "llama": {**SIZES, "num_key_value_heads": 1},
    "mistral": {**SIZES, "num_key_value_heads": 1, "sliding_window": 4},
    "qwen3": {**SIZES, "num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {**SIZES, "hidden_size": 24, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
}


def tokenized(data: dict, tokenizer, max_length: int = 64, max_prompt_length: int = 32, sft_mode: bool = False, add_bos: bool = False):
    """A split of datasets given as {name: (contract, options)}."""
    form = SFT if sft_mode else PAIRS
    tables = [
        tokenize(name, examples_in_form(name, contract, form)[0], options, tokenizer, add_bos, silent=True)
        for name, (contract, options) in data.items()
    ]
    return TokenizedSplit(tables, tokenizer, max_length, max_prompt_length, form, add_bos)


def compose(*overrides: str, name: str = "config"):
    """The config that a command line makes, of train.py or another tool."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base=None):
        return hydra.compose(name, list(overrides))


QUIET = ["exp_name=test", "wandb.enabled=false", "sample_during_eval=false", "minimum_log_interval_secs=0"]


def run(*overrides: str, world=None) -> Path:
    """A run as the command line would make it, in this process or from it, without wandb and samples; its folder."""
    overrides = [*QUIET, *overrides]
    return Path(train.run(compose(*overrides), overrides, world))


def run_together(runs: list[list[str]], ranks: int, folder: Path) -> None:
    """Runs of several ranks, which torchrun starts once for all of them: a start takes longer than a small run."""
    (folder / "runs.json").write_text(json.dumps(runs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(ROOT / "tests" / "runs_together.py"), str(folder / "runs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def logs_of(run_dir: Path, split: Optional[str] = None) -> list[dict]:
    logs = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [log for log in logs if split in (None, log["split"])]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "LATEST" / "policy.pt", weights_only=True)["state"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls train.py's main with arguments: (exit code, standard output, standard error)."""

    def call(*arguments: str):
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None  # as in a new process
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        try:
            train.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def mini_tokenizer():
    return AutoTokenizer.from_pretrained(MINI / "model")


CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A tokenizer of bytes-like characters whose end of sequence, <|end|>, is also the template's end of turn."""
    vocabulary = {"<unused>" if i == 10 else chr(i): i for i in range(127)} | {"\n": 127, "<|start|>": 128, "<|end|>": 129, "<|bos|>": 130}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", bos_token="<|bos|>", pad_token="<|end|>", extra_special_tokens=["<|start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
