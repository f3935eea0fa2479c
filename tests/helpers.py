"""Helpers of the tests: small runs in this process, processes to start and watch, and ranks that live for a whole test run."""

import functools
import gzip
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Optional, Union

import hydra
import pool
import pytest
import tokenizers
import torch
import transformers
from hydra.core.global_hydra import GlobalHydra

import train
from preference_datasets import default_options, get_dataset, load_split
from tdpo.data.contract import PAIRS, SFT, examples_in_form
from tdpo.data.split import TokenizedSplit
from tdpo.data.token_cache import tokenize
from tdpo.distributed.launch import _loopback_store, rank_environment
from tdpo.utils import IGNORED, PeerError

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "tests" / "golden" / "mini"
WORKERS = ROOT / "tests" / "workers"
GOLDEN = ROOT.parent / "shared" / "golden"
needs_shared = pytest.mark.skipif(
    not (GOLDEN / "tiny-neox").is_dir(), reason=f"the recorded runs on HH rows are not part of the repository: no {GOLDEN}"
)

# Options of small runs on the rows of tests/golden: SFT, and TDPO2 from recorded weights.
DATA = ["model=blank_model", f"model.name_or_path={MINI}/model", "datasets=[hh]", f"datasets.hh.path={MINI}/data"]
DATA += ["max_length=64", "max_prompt_length=32", "batch_size=8", "lr=5e-4", "warmup_steps=3"]
ARCHIVE = f"model.archive={MINI}/sft_policy.pt"
PREFERENCE = [*DATA, "loss=tdpo", ARCHIVE]
QUIET = ["exp_name=test", "wandb.enabled=false", "sample_during_eval=false", "minimum_log_interval_secs=0"]
SHARDED = ["trainer=FSDPTrainer"]
TENSOR = ["trainer=TensorParallelTrainer"]

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
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def _bpe(kind: str) -> str:
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if kind == "bytes":
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        decoders = tokenizers.decoders
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = [chr(i) for i in range(33, 127)] + ["▁", "\n"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(['a question? The answer: yes it is, or no.\n{\n{"name": 1}'] * 3, trainer)
    return inner.to_str()


def bpe_tokenizer(kind: str = "bytes", template: str = CHATML, eos: str = "<|im_end|>", **others):
    """Return a small BPE tokenizer with a chat template.

    Args:
        kind: bytes, as of GPT-2 and Qwen; or, as of Llama 2 and Mistral, with a space in front of the first text (first) or of every text
            between special tokens (always).
        template, eos, others: of the tokenizer.
    """
    special = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    rest = [token for token in ("<|im_start|>", "<|im_end|>", "</s>") if token != eos]
    inner = tokenizers.Tokenizer.from_str(_bpe(kind))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special, extra_special_tokens=rest, **others)
    tokenizer.chat_template = template
    return tokenizer


# --- data ---


def write_lines(path: Path, rows: list) -> str:
    """Write rows (strings as they are, others as JSON) to a .jsonl or .jsonl.gz; return its path."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return str(path)


def turn(role: str, content: str, segment: Optional[bool] = None) -> dict:
    """Return a chat message; `segment` marks it for sdpo_segment."""
    return {"role": role, "content": content, **({} if segment is None else {"segment": segment})}


HISTORY = [turn("user", "hi"), turn("assistant", "yo")]
SEGMENTS = {
    "chosen": [
        *HISTORY,
        turn("user", "a"),
        turn("assistant", "bc", True),
        turn("user", "d"),
        turn("assistant", "e", True),
        turn("user", "x"),
    ],
    "rejected": [*HISTORY, turn("user", "a"), turn("assistant", "f", True), turn("user", "gh"), turn("assistant", "ij", True)],
}


def load(name, split="train", tokenizer=None, **options):
    return get_dataset(name, split, silent=True, options={**default_options(name), **options}, tokenizer=tokenizer)


def pair(prompt="P", chosen=" a", rejected=" b", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def tokenized(data: dict, tokenizer, max_length: int = 64, max_prompt_length: int = 32, sft_mode: bool = False, add_bos: bool = False):
    """Tokenize datasets, given as {name: (contract, options)}, into one split."""
    form = SFT if sft_mode else PAIRS
    tables = [
        tokenize(name, examples_in_form(name, contract, form)[0], options, tokenizer, add_bos, silent=True)
        for name, (contract, options) in data.items()
    ]
    return TokenizedSplit(tables, tokenizer, max_length, max_prompt_length, form, add_bos)


def elements_of(data: Union[str, list], folder: Path, tokenizer, form=PAIRS, lengths=(2000, 1200), **options) -> list[dict]:
    """Return what the jsonl dataset makes of rows, or of those at a path: published batch elements, one an example."""
    path = data if isinstance(data, str) else write_lines(folder / "rows.jsonl", data)
    node = {**default_options("jsonl"), "path": path, "eval_path": path, **options}
    split = load_split({"jsonl": node}, "train", tokenizer, *lengths, form)
    return [split.element(example) for example in next(split.epochs(0, shuffle=False))]


EQUAL = 3  # index of the pair of token_pairs with equal responses


def token_lists(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 31, (n,), generator=generator).tolist() for n in lengths]


def token_pairs() -> list[tuple[list[int], list[list[int]]]]:
    """Return pairs of different lengths: with prompts and responses of one token, equal responses, and longer than every window."""
    (same,) = token_lists(4)
    rows = [
        token_lists(5, 6, 3),
        token_lists(1, 1, 7),
        token_lists(9, 1, 1),
        [*token_lists(3), same, same],
        token_lists(2, 9, 8),
        token_lists(1, 14, 2),
    ]
    return [(prompt, responses) for prompt, *responses in rows]


def padded(rows) -> dict[str, torch.Tensor]:
    """Return the pairs as a collated batch."""
    batch = {}
    for i, role in enumerate(("chosen", "rejected")):
        whole = [torch.tensor(prompt + responses[i]) for prompt, responses in rows]
        labels = [torch.tensor([IGNORED] * len(prompt) + responses[i]) for prompt, responses in rows]
        masks = [torch.ones_like(ids) for ids in whole]
        for kind, values, padding in (("input_ids", whole, 0), ("attention_mask", masks, 0), ("labels", labels, IGNORED)):
            batch[f"{role}_{kind}"] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
    return batch


# --- runs in this process ---


def compose(*overrides: str, name: str = "config"):
    """Compose the config of a command line, of train.py or of another command (`name`)."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base=None):
        return hydra.compose(name, list(overrides))


def run(*overrides: str, world=None) -> Path:
    """Run train.py's `run` from this process, without wandb and samples, and return the run's folder."""
    overrides = [*QUIET, *overrides]
    return Path(train.run(compose(*overrides), overrides, world))


def copied(run_dir: Path, to: Path) -> Path:
    """Copy a run's folder, to damage or resume the copy, so that a small run is made only once."""
    return shutil.copytree(run_dir, to, symlinks=True)


def logs_of(run_dir: Path, split: Optional[str] = None) -> list[dict]:
    logs = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [log for log in logs if split in (None, log["split"])]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "LATEST" / "policy.pt", weights_only=True)["state"]


TIMES = {"examples_per_second", "tokens_per_second", "peak_memory_gb", "seconds_left"}  # the metrics that depend on the machine


def losses_of(run_dir: Path) -> list[dict]:
    """Return every log, without the metrics that depend on the clock."""
    return [{name: value for name, value in log.items() if name not in TIMES} for log in logs_of(run_dir)]


def assert_same_run(ours: Path, straight: Path) -> None:
    """Compare weights, logs and samples bit for bit."""
    assert losses_of(ours) == losses_of(straight)
    assert_same_weights(ours, straight)
    if (straight / "samples.jsonl").exists():
        assert (ours / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def assert_same_weights(ours: Path, straight: Path) -> None:
    """Compare weights bit for bit."""
    expected = weights_of(straight)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(ours).items())


def assert_close_logs(ours: list[dict], theirs: list[dict], **tolerance: float) -> None:
    """Compare every metric of every log, by default within 1e-4 relative or 1e-5 absolute. Accuracies are left out: ties are noise."""
    tolerance = tolerance or {"rel": 1e-4, "abs": 1e-5}
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            if name in TIMES or name.endswith("accuracies") or name == "split":
                continue
            same = value is None if other[name] is None else value == pytest.approx(other[name], **tolerance)
            assert same, (mine["counters/examples"], name, value, other[name])


# --- recorded runs of the published code ---

RELATIVE, ABSOLUTE = 1e-4, 1e-5
SHARES = {"tdpo": 0.25}  # of that tolerance, within which a run stays; 1 for other losses
KEYS = (
    "seed batch_size eval_batch_size lr gradient_accumulation_steps max_grad_norm max_length max_prompt_length n_examples "
    "n_eval_examples optimizer warmup_steps eval_every do_first_eval"
).split()


def recorded(name: str, folder: Path = MINI, model: Path = MINI / "model", data: Path = MINI / "data") -> tuple[dict, list[str]]:
    """Return a recorded run, and the command line that repeats it."""
    golden = json.loads((folder / f"{name}.json").read_text())
    config, loss = golden["config"], dict(golden["config"]["loss"])
    loss_name = loss.pop("name")
    if loss_name == "ipo":  # the published IPO has only beta
        loss = {"beta": loss["beta"]}
    arguments = [f"{key}={config[key]}" for key in KEYS]
    arguments += ["model=blank_model", f"model.name_or_path={model}", "datasets=[hh]", f"datasets.hh.path={data}", "n_epochs=null"]
    arguments += [f"loss={loss_name}", *(f"loss.{key}={value}" for key, value in loss.items())]
    return golden, arguments if loss_name == "sft" else [*arguments, f"model.archive={folder}/sft_policy.pt"]


def assert_recorded_logs(golden: dict, run_dir: Path) -> None:
    """Compare every metric of every recorded log. Our run has one more eval, after the last step."""
    share = SHARES.get(golden["config"]["loss"]["name"], 1)
    for split in ("train", "eval"):
        ours = logs_of(run_dir, split)
        assert len(ours) == len(golden[split]) + (split == "eval")
        for i, (expected, actual) in enumerate(zip(golden[split], ours)):
            for key, value in expected.items():
                noise = key.endswith("/accuracies") and abs(expected[key.replace("accuracies", "margins")]) < 1e-6
                if key != "step_examples" and not noise:
                    assert abs(actual[key] - value) <= share * (RELATIVE * abs(value) + ABSOLUTE), f"{split} log {i} {key}"


# --- processes ---

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STANDALONE = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", WORKERS))), "OMP_NUM_THREADS": "1"}


MODEL_CODE = "transformers.models.gpt_neox.modeling_gpt_neox"  # of the small models; imported when a model is built, which takes seconds


@functools.cache
def forks():
    """Return a multiprocessing context that forks from a process with all imports done, because these take longer than a small run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pool", "train", "sample", "helpers", "sharded_families", MODEL_CODE])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        forkserver.ensure_running()
    return context


class Command:
    """A script of the repository in a forked process (see `forks`), with the interface of subprocess.Popen."""

    def __init__(self, script: str, *arguments: str, env: Optional[dict] = None, output: Optional[Path] = None, cwd: Path = ROOT):
        self.output = output or Path(tempfile.mkstemp(prefix="output-")[1])
        job = (str(ROOT / script), [str(argument) for argument in arguments], dict(env or os.environ), str(self.output), str(cwd))
        self.process = forks().Process(target=pool.run_script, args=job)
        self.process.start()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate

    @property
    def returncode(self) -> Optional[int]:
        return self.process.exitcode

    poll = returncode.fget

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def communicate(self, timeout: Optional[float] = None) -> tuple[str, None]:
        """Wait for the end, and return what the script and its child processes have printed."""
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout, self.output.read_text())
        return self.output.read_text(), None


def forked_script(script: str, *arguments: str, output=None, environment=None) -> int:
    """Like experiments.scripts.run_script, but forked, which is faster."""
    command = Command(script, *arguments, env=environment, output=output and Path(output.name))
    printed, _ = command.communicate()
    assert command.returncode == 0, printed[-3000:]
    return 0


def start(arguments: list[str], program: Sequence[str] = (), env: Optional[dict] = None):
    """Start train.py, directly or under another program such as torchrun; `communicate` returns its output."""
    if not program:
        return Command("train.py", *QUIET, *arguments, env=env)
    command = [*program, str(ROOT / "train.py"), *QUIET, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def start_unsupervised(script: str, arguments: list[str], n: int = 2) -> list[Command]:
    """Ranks that no launcher watches, as under srun: rank 0 has the store."""
    world = {**os.environ, "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if n > 1 else world for rank in range(n)]
    return [Command(script, *arguments, env=environment) for environment in ranks]


def start_supervised(script: str, arguments: list[str], n: int = 2) -> list[Command]:
    """Ranks as a launcher starts them, which has the store, but does not end the others when one has ended."""
    store = _loopback_store(n, None)
    ranks = [{**os.environ, **rank_environment(rank, n, store.port), "OMP_NUM_THREADS": "1"} for rank in range(n)]
    commands = [Command(script, *arguments, env=environment) for environment in ranks]
    commands[0].store = store  # lives as long as they do
    return commands


def ranks_of(folder: Path) -> dict[int, int]:
    """Return the process ids, by rank, of the processes that train into a folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                environment = dict(entry.split(b"=", 1) for entry in (process / "environ").read_bytes().split(b"\0") if b"=" in entry)
                if b"RANK" in environment:
                    found[int(environment[b"RANK"])] = int(process.name)
        except OSError:  # the process has ended
            continue
    return found


def wait_for(condition, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.05)


def has_steps(folder: Path, n: int) -> bool:
    try:
        return len(logs_of(folder, "train")) >= n
    except FileNotFoundError:  # not begun, or just renamed by a start that found no checkpoint
        return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """Ranks that are started once for a whole test run and do one job after another (workers/pool.py)."""

    def __init__(self, n: int, folder: Path):
        self.store = _loopback_store(n, None)
        self.outputs = [folder / f"rank-{rank}-of-{n}" for rank in range(n)]
        pipes = [forks().Pipe() for _ in range(n)]
        self.pipes = [here for here, _ in pipes]
        jobs = [(there, rank_environment(i, n, self.store.port), str(self.outputs[i])) for i, (_, there) in enumerate(pipes)]
        self.processes = [forks().Process(target=pool.serve, args=job) for job in jobs]
        for process in self.processes:
            process.start()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def call(self, function: str, *arguments) -> list:
        """Call a function of workers/pool.py on all ranks, and return its results by rank; raise the first UserError or RunError."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe, output in zip(self.pipes, self.outputs):
            assert pipe.poll(240), output.read_text()[-3000:]
            answers.append(pipe.recv())
        errors = [error for _, error in answers if error is not None]
        for error in errors:
            if not isinstance(error, PeerError):
                raise error
        assert not errors, errors
        return [value for value, _ in answers]

    def run(self, *overrides: str) -> Path:
        """Run train.py's `run` on all ranks, and return the run's folder."""
        return Path(self.call("train", *overrides)[0])
