"""The command line: which configs compose, which are refused, and with which message."""

import contextlib
import io
import os
import random
import re
import shlex
import signal
import sys

import pytest
import torch
import tqdm
from helpers import MINI, QUIET, ROOT, compose, logs_of, pair, run, write_lines
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import sample
import train
from tdpo import losses
from tdpo.cli import command_line
from tdpo.cli import schema as config_schema
from tdpo.cli.check_config import check_config, check_tool_config
from tdpo.cli.command_line import override
from tdpo.gpu import allocate_in_segments
from tdpo.utils import Console, UserError, lenient_console

MODELS = sorted(file.stem for file in (ROOT / "config" / "model").glob("*.yaml"))


TOOLS = {
    "sample": config_schema.Sample,
    "eval": config_schema.Evaluation,
    "token_report": config_schema.TokenReport,
    "export": config_schema.Export,
}


@pytest.mark.parametrize("tool", TOOLS)
def test_keys_of_the_other_commands(tool):
    config = OmegaConf.to_container(compose("run=x", name=tool))
    assert set(TOOLS[tool].model_fields) - {"datasets"} == set(config)
    with pytest.raises(UserError, match=r"missing: .*run=\.\.\."):
        check_tool_config(compose(name=tool), TOOLS[tool])


PUBLISHED = (
    "model=pythia28 datasets=[hh] exp_name=anthropic_tdpo_pythia28 gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 "
    "trainer=FSDPTrainer sample_during_eval=false model.fsdp_policy_mp=bfloat16 "
)


@pytest.mark.parametrize(
    "arguments,variant",
    [
        ("loss=sft", "sft"),
        ("loss=tdpo loss.alpha=0.5 loss.beta=0.1 model.archive=/path/to/archive/from/sft/LATEST/policy.pt", "tdpo2"),
        ("loss=tdpo loss.beta=0.1 loss.if_tdpo2=false model.archive=/path/to/archive/from/sft/LATEST/policy.pt", "tdpo1"),
    ],
)
def test_published_commands(arguments, variant):
    """The commands of the published README (Vance0124) compose, and select the right loss."""
    overrides = (PUBLISHED + arguments).split()
    config = compose(*overrides)
    check_config(config, overrides)
    hyperparameters = dict(config.loss)
    assert losses.get_objective(hyperparameters.pop("name"), **hyperparameters).name == variant


def test_published_defaults():
    """Every key of the published config keeps its default, except those with a comment below."""
    config = compose("exp_name=x", "model=blank_model", "model.name_or_path=x", "datasets=[hh]")
    published = {
        "seed": 0, "batch_size": 4, "eval_batch_size": 16, "debug": False, "fsdp_port": None, "sample_during_eval": True,
        "n_eval_model_samples": 16, "do_first_eval": True, "lr": 5e-6, "gradient_accumulation_steps": 1, "max_grad_norm": 10.0,
        "max_length": 512, "max_prompt_length": 256, "n_epochs": 1, "n_examples": None, "n_eval_examples": 256, "trainer": "BasicTrainer",
        "optimizer": "RMSprop", "warmup_steps": 150, "activation_checkpointing": False, "eval_every": 20_000,
        "minimum_log_interval_secs": 1.0,
    }  # fmt: skip
    assert {key: config[key] for key in published} == published
    assert list(config.local_dirs) == ["/scr-ssd", "/scr", ".cache"]
    assert dict(config.wandb) == {"enabled": True, "entity": None, "project": "token-level-direct-preference-optimization"}
    assert config.loss.name == "sft" and list(config.datasets) == ["hh"]
    assert config.local_run_dir is None  # published: a resolver that creates the folder
    assert config.model.reference_dtype is None  # published: float16, which differs from the policy at the first step
    tdpo = compose("exp_name=x", "loss=tdpo").loss
    own = {"sft_weight": 0.0}  # not published
    assert dict(tdpo) == {"name": "tdpo", "if_tdpo2": True, "alpha": 0.5, "beta": 0.1, "reference_free": False, **own}


@pytest.mark.parametrize("model", MODELS)
def test_models(model):
    """Every model file is complete and names the class of its block; published names keep their weights."""
    overrides = ["exp_name=x", f"model={model}"] + (["model.name_or_path=x"] if model == "blank_model" else [])
    config = compose(*overrides)
    check_config(config)
    assert model == "blank_model" or config.model.block_name
    assert config.model.policy_dtype == "float32"
    names = {"pythia28": "EleutherAI/pythia-2.8b", "llama7b": "huggyllama/llama-7b", "gptj": "EleutherAI/gpt-j-6b", "gpt2-xl": "gpt2-xl"}
    assert config.model.name_or_path == names.get(model, config.model.name_or_path)


def test_tiny_brings_its_own_learning_rate_and_the_command_line_wins():
    assert compose("exp_name=x").lr == 1e-3 and compose("exp_name=x", "lr=3e-4").lr == 3e-4
    assert compose("exp_name=x", "model=pythia28").lr == 5e-6


def test_several_datasets_keep_their_order_and_options():
    config = compose("exp_name=x", "datasets=[shp,hh]", "datasets.hh.path=/local/copy", "model=pythia28")
    check_config(config)
    assert list(config.datasets) == ["shp", "hh"] and config.datasets.hh.path == "/local/copy"


def test_the_schema_knows_every_key_and_every_key_has_a_comment():
    def annotated(node, prefix=""):
        return {prefix + key for key in node.model_fields}

    config = OmegaConf.to_container(compose("exp_name=x"))
    assert annotated(config_schema.Config) == set(config)
    assert annotated(config_schema.Model) == set(config["model"]) and annotated(config_schema.Wandb) == set(config["wandb"])
    for file in (ROOT / "config").rglob("*.yaml"):
        lines = file.read_text().splitlines()
        for i, line in enumerate(lines):
            if re.match(r"[a-z_]+: *[^ ]", line) and file.parent.name != "model" and not line.startswith(("name:", "defaults:", "hydra:")):
                assert lines[i - 1].startswith("#"), f"{file.name}: {line} has no comment"


REFUSED = {
    "": "missing: exp_name=...",
    "exp_name=x loss=tdpo loss.bta=1": "unknown key loss.bta (did you mean loss.beta?)",
    "exp_name=x gradient_acumulation_steps=2": "unknown key gradient_acumulation_steps (did you mean gradient_accumulation_steps?)",
    "exp_name=x loss=tdpo +loss.alpa=1": "unknown key loss.alpa (did you mean loss.alpha?)",
    "exp_name=x +learning_rate=1": "unknown key learning_rate",
    "exp_name=x modle=tiny": "unknown key modle (did you mean model?)",
    "exp_name=x model=pythia2": "model=pythia2: there is no config/model/pythia2.yaml (did you mean pythia28?)",
    "exp_name=x loss=tdpo3": "loss=tdpo3: there is no config/loss/tdpo3.yaml (did you mean tdpo?)",
    "exp_name=x datasets=[hhh]": "datasets=hhh: there is no config/datasets/hhh.yaml (did you mean hh?)",
    "exp_name=x loss": "loss: not of the form key=value",
    "exp_name=x lr=abc": "lr=abc: must be a valid number",
    "exp_name=x lr=0": "lr=0: must be greater than 0",
    "exp_name=x warmup_steps=1.5": "warmup_steps=1.5: must be a whole number of steps, or, below 1, a share of the run's steps",
    "exp_name=x warmup_steps=-1": "warmup_steps=-1: must be greater than or equal to 0",
    "exp_name=x wandb=false": "wandb=False: wandb has keys of its own; set wandb.enabled=... or wandb.entity=... or wandb.project=...",
    "exp_name=x keep_best=loss/eval": "keep_best=loss/eval: keep_best has keys of its own; set keep_best.metric=... or keep_best.mode=...",
    "exp_name=x sinks=wandb": "sinks=wandb: must be a list, such as sinks=[wandb]",
    "exp_name=x stop_when=20": "stop_when=20: must be a mapping, such as 'stop_when={name: value}'",
    "exp_name=x optimizer_options=[1]": "optimizer_options=[1]: the config has another kind of value there",
    "exp_name=x adapter.targets=5": "adapter.targets=5: must be 'all-linear' or a list, such as adapter.targets=[5]",
    "exp_name=x stop_when={{loss/eval:<1}}": "within {} and [], text with special characters needs quotes of its own",
    "exp_name=x batch_size=2.5": "batch_size=2.5: must be a valid integer",
    "exp_name=x debug=2": "debug=2: must be a valid boolean",
    "exp_name=../x": "exp_name='../x': must have only letters, digits",
    "exp_name=..": "exp_name='..': must not contain '..'",
    "exp_name=x trainer=Trainer": "trainer=Trainer: must be 'BasicTrainer', 'FSDPTrainer' or 'TensorParallelTrainer'",
    "exp_name=x nproc_per_node=2": "nproc_per_node=2: trainer=BasicTrainer runs in one process; use trainer=FSDPTrainer",
    "exp_name=x parallel.replicas=2": "parallel.replicas=2 needs trainer=FSDPTrainer",
    "exp_name=x resume=auto": "resume=auto needs local_run_dir",
    "exp_name=x resume=must": "resume=must needs local_run_dir",
    "exp_name=x resume=nowhere": "resume=nowhere: nowhere does not exist",
    "exp_name=x resume=runs/x/step-64": "runs/x/step-64 does not exist (did you mean resume=runs/x?)",
    "exp_name=x trainer=FSDPTrainer model.block_name=GPT2Block": "model.block_name=GPT2Block: GPTNeoXForCausalLM has no such module; "
    "its layers are GPTNeoXLayer",
    "exp_name=x trainer=FSDPTrainer parallel.replicas=2": "parallel.replicas=2 does not divide the number of processes, 1; use 1",
    "exp_name=x optimizer=rmsprop": "optimizer=rmsprop: not a supported optimizer of torch.optim (did you mean RMSprop?)",
    "exp_name=x optimizer=LBFGS": "optimizer=LBFGS: not a supported optimizer of torch.optim",
    "exp_name=x model.policy_dtype=fp16": "model.policy_dtype=fp16: must be 'float32', 'bfloat16', 'float16' or 'float64'",
    "exp_name=x loss=dpo loss.beta=-1": "loss.beta=-1: must be greater than 0",
    "exp_name=x loss=dpo loss.label_smoothing=0.5": "loss.label_smoothing=0.5: must be less than 0.5",
    "exp_name=x loss=tdpo loss.reference_free=true": "loss.reference_free=true: TDPO's SeqKL needs the reference",
    "exp_name=x loss=tdpo loss.if_tdpo2=no": "loss.if_tdpo2=no: must be true or false",
    "exp_name=x loss=null": "Config group override must be a string or a list",
    "exp_name=x datasets=[]": "missing: datasets=...",
    "exp_name=x lr=inf": "lr=inf: must be a finite number",
    "exp_name=x seed=4294967296": "seed=4294967296: must be less than 4294967296",
    "exp_name=x optimizer=Muon": "optimizer=Muon: not a supported optimizer of torch.optim",
    "exp_name=x model.name_or_path=gpt2": "model.name_or_path=gpt2 and model.from_config exclude each other",
    "exp_name=x model.from_config.num_attention_heads=3": "model from_config cannot be loaded: ",
    "exp_name=x model.from_config.model_type=t5": "causal language model",
    "exp_name=x loss=tdpo model.archive={root}/tests": "tests is no folder of weights: it has no config.json",
    "exp_name=x datasets.reviews.invalid_rows=maybe": "datasets.reviews.invalid_rows=maybe: must be 'error', 'skip' or 'keep'",
    "exp_name=x datasets.reviews.n_train=9999": "datasets.reviews.n_train=9999: must be less than or equal to 2856",
    "exp_name=x datasets=[jsonl]": "missing: datasets.jsonl.path=...",
    "exp_name=x datasets=[jsonl] datasets.jsonl.path=/nowhere.jsonl": "'/nowhere.jsonl' does not exist",
    "exp_name=x datasets=[hh] datasets.hh.path={root}/tests": "tests' has no split 'train'",
    "exp_name=x batch_size=10 gradient_accumulation_steps=4": "batch_size=10 is not divisible by gradient_accumulation_steps=4",
    "exp_name=x max_prompt_length=64": "max_prompt_length=64 leaves no room for a response: it must be below max_length=64",
    "exp_name=x max_length=129": "max_length=129 exceeds the model's 128 positions",
    "exp_name=x eval_every=2": "eval_every=2 is less than batch_size=4",
    "exp_name=x n_epochs=null": "n_epochs and n_examples are both null",
    "exp_name=x batch_size=4096": "2,816 train examples, fewer than batch_size=4096",
    "exp_name=x model=blank_model": "missing: model.name_or_path=...",
    "exp_name=x model=blank_model model.name_or_path=/no/model": "'/no/model' does not exist",
    "exp_name=x model=pythia160m": "tokenizer 'EleutherAI/pythia-160m' cannot be loaded",
    "exp_name=x loss=tdpo model.archive=/no/policy.pt": "model.archive=/no/policy.pt does not exist",
    "exp_name=x loss=tdpo model.archive={root}/README.md": "README.md is not a policy.pt",
    "exp_name=x model.chat_template_kwargs.a=1": "a new entry needs a +, as in +model.chat_template_kwargs.a=...",
    "exp_name=x +model.chat_template_kwargs.a=1": "model.chat_template_kwargs is given, but the tokenizer has no chat template",
    "exp_name=x model.chat_template=/no/file.jinja": "model.chat_template=/no/file.jinja: neither a file nor",
    "exp_name=x loss=tdpo model.archive={mini}/sft_policy.pt": "other shape: gpt_neox.embed_in.weight (300, 32) (model: (138, 128))",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused_in_a_line_with_exit_code_2(arguments, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*arguments.format(root=ROOT, mini=MINI).split())
    lines = err.splitlines()
    assert code == 2 and len(lines) <= 2 and lines[0].startswith("error: "), err
    assert REFUSED[arguments] in err
    assert os.listdir(tmp_path) == []  # nothing was written
    assert not torch.distributed.is_initialized()


def test_all_problems_are_reported_at_once(command):
    code, _, err = command("exp_name=x", "lr=abc", "batch_size=-1", "optimizer=foo", "loss=dpo", "loss.beta=0", "model.policy_dtype=x")
    assert code == 2 and len(err.splitlines()) == 5
    for key in ("lr=abc", "batch_size=-1", "optimizer=foo", "loss.beta=0", "model.policy_dtype=x"):
        assert f"error: {key}: " in err


def test_cfg_job_prints_and_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("exp_name=x", "--cfg", "job")
    assert code == 0 and "exp_name: x" in out and os.listdir(tmp_path) == []


def test_values_get_their_types_and_references_are_resolved():
    """The run and its config.yaml use the values that were checked."""
    overrides = [
        "exp_name=2024",
        "batch_size=4.0",
        "lr='1e-3'",
        "n_eval_examples=1e2",
        "wandb.project=p-${exp_name}",
        "loss=tdpo",
        "loss.alpha='0.5'",
    ]
    config = compose(*overrides, "loss.beta=${loss.alpha}", "datasets.reviews.n_train=${batch_size}")
    check_config(config)
    assert (config.exp_name, config.batch_size, config.lr, config.n_eval_examples) == ("2024", 4, 1e-3, 100)
    assert isinstance(config.batch_size, int) and isinstance(config.n_eval_examples, int) and isinstance(config.lr, float)
    assert config.loss.beta == 0.5 and config.datasets.reviews.n_train == 4
    assert OmegaConf.to_container(config, resolve=False)["wandb"]["project"] == "p-2024"


def test_adjusted_and_ignored_values_are_reported():
    overrides = ["exp_name=x", "loss=tdpo", "loss.if_tdpo2=false", "loss.alpha=0.3", "batch_size=64", "save_every=100"]
    config = compose(*overrides)
    notes = "\n".join(check_config(config, overrides).notes)
    assert (
        config.eval_every == 19_968 and "eval_every=20000 rounded down to 19968" in notes
    )  # 20,000 is the default, and 64 the batch_size of the published commands
    assert config.save_every == 64 and "TDPO1 has no alpha" in notes and "without model.archive" in notes
    assert check_config(compose("exp_name=x")).notes == []


def test_an_override_can_carry_any_text():
    """What Hydra and OmegaConf make of it is the text again."""
    moments, parser = random.Random(0), OverridesParser.create()
    parts = [*"ab'\"\\$,{}()=: é数~[]#%&@", "${", "\\", "'", "${a}", "\\${"]
    for _ in range(2000):
        text = "".join(moments.choices(parts, k=moments.randint(1, 8)))
        assert OmegaConf.create({"k": parser.parse_override(override("k", text)).value()}).k == text, override("k", text)


def test_a_console_of_another_encoding_gets_escapes():
    written = io.BytesIO()
    console = Console(io.TextIOWrapper(written, encoding="ascii", write_through=True))
    print("naïve 数", file=console)
    tqdm.tqdm.write("é", file=console)
    assert written.getvalue() == b"na\\xefve \\u6570\n\\xe9\n" and console.encoding == "ascii"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_console_that_cannot_be_written_ends_no_run(stream, tmp_path, monkeypatch):
    """A full disk under a log file, a closed terminal."""
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, stream, full)
        with lenient_console():
            run_dir = run("loss=sft", "batch_size=8", "n_examples=8", "n_eval_examples=8", f"local_run_dir={tmp_path}/run")
            getattr(sys, stream).flush()
        with contextlib.suppress(OSError):
            full.close()
    assert (run_dir / "LATEST" / "policy.pt").exists()


@pytest.mark.parametrize("error,printed", [(OSError(28, "No space left on device", "/a/b"), "error: /a/b: No space left on device")])
def test_an_unexpected_error_of_the_disk_is_a_line(error, printed, command, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "check_config", fail)
    code, _, err = command("exp_name=x")
    assert code == 1 and err.startswith(printed) and len(err.splitlines()) == 1


def test_ctrl_c_while_an_error_is_reported_changes_nothing(monkeypatch, command):
    """A rank waits before it exits, so that another one gets to print its error."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "check_config", interrupted)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command_line.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert command("exp_name=x")[0] == 130


def test_every_command_computes_alike_on_a_gpu(tmp_path):
    """Without cuDNN's attention, and with TF32: otherwise the numbers of one checkpoint would differ between commands."""

    def begin() -> None:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.matmul.allow_tf32 = False

    def as_they_should() -> bool:
        return not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.matmul.allow_tf32

    begin()
    run("loss=sft", "batch_size=8", "n_examples=8", "n_eval_examples=8", f"local_run_dir={tmp_path}/run")
    assert as_they_should()
    begin()
    sample.run(compose(f"run={tmp_path}/run", f"out={tmp_path}/out", "n_prompts=1", name="sample"))
    assert as_they_should()


def test_memory_of_a_gpu_grows_in_place_unless_the_user_set_it(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    allocate_in_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    allocate_in_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")


# --- lines that help ---

PAIRS_DATA = [*QUIET, "model=tiny", "datasets=[jsonl]", "dry_run=true"]


def write_pairs(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, [pair(f"p{i}", " the film was good", " bad") for i in range(40)])


@pytest.mark.parametrize(
    "name",
    [
        "pairs (1).jsonl",
        "beta=0.1/p.jsonl",
        "données/p.jsonl",
        "数据/p.jsonl",
        "ann's/p.jsonl",
        "a&b.jsonl",
        "a,b.jsonl",
        "[x]/p.jsonl",
        "~/home.jsonl",
        "a b.jsonl",
    ],
)
def test_a_path_with_special_characters_works_or_the_line_shows_how_to_quote_it(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_pairs(tmp_path / name.removeprefix("~/"))
    code, _, err = command(*PAIRS_DATA, f"datasets.jsonl.path={name}")
    if code:
        assert code == 2 and "Traceback" not in err and len(err.splitlines()) == 2
        (argument,) = shlex.split(err.splitlines()[1].split("quotes within quotes: ")[1])
        code, out, err = command(*PAIRS_DATA, argument)
        assert code == 0 and "40 rows read" in out, err


def test_a_dry_run_reads_all_shows_an_example_and_writes_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "p.jsonl")
    arguments = [
        *PAIRS_DATA,
        "datasets.jsonl.path=p.jsonl",
        "loss=dpo",
        f"local_run_dir={tmp_path}/run",
        "trainer=FSDPTrainer",
        "nproc_per_node=2",
    ]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "example jsonl:0.0; ⟦...⟧ is in the loss" in out and out.count("⟦") == 3 and "⟦ bad <|endoftext|>⟧" in out
    assert os.listdir(tmp_path) == ["p.jsonl"] and out.rstrip().endswith("dry run: nothing was trained")
    code, _, err = command(*arguments, "model.archive=nothing.pt")
    assert code == 2 and "nothing.pt" in err


def test_a_warm_up_longer_than_the_run_is_said(command, tmp_path):
    small = [*QUIET, "datasets.reviews.n_train=64", "datasets.reviews.n_test=8", "batch_size=16", "do_first_eval=false", "debug=true"]
    code, out, _ = command(*small, f"local_run_dir={tmp_path}/a", "warmup_steps=9", "lr=1e-3")
    assert code == 0
    assert "warning: warmup_steps=9, but the run has 4 steps: the learning rate only reaches 0.0004 of lr=0.001" in out
    assert logs_of(tmp_path / "a", "train")[-1]["lr"] == pytest.approx(4e-4)
    _, out, _ = command(*small, f"local_run_dir={tmp_path}/b", "warmup_steps=3")
    assert "warmup_steps=3, but" not in out
