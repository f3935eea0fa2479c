"""README and docs/: every command that they show composes, those on the embedded data run, examples work, links lead somewhere."""

import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import preference_datasets
from preference_datasets import get_dataset
from tdpo import losses
from tdpo.cli import schema
from tdpo.cli.check_config import check_config, check_tool_config
from tdpo.losses import ResponseScores, get_objective
from tdpo.utils import UserError

DOCUMENTS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
TOOLS = {"sample.py": schema.Sample, "eval.py": schema.Evaluation, "token_report.py": schema.TokenReport}
# What makes a documented run short: it is run for its command line, not for its result.
RUN = ["n_examples=32", "n_epochs=null", "batch_size=16", "n_eval_examples=8", "wandb.enabled=false", "sample_during_eval=false"]
SHORT = {
    "train.py": [*RUN, "datasets.reviews.n_train=128", "datasets.reviews.n_test=8"],
    "sample.py": ["n_prompts=4"],
    "eval.py": ["n_pairs=8", "n_prompts=4", "n=2"],
    "token_report.py": ["n_pairs=4"],
    "experiments/spin.py": ["iterations=1", "n_prompts=8", *RUN, "batch_size=4"],
    "plot.py": [],
}


def blocks_of(document: str, language: str = "") -> list[str]:
    """The indented or fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def commands_of(document: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of every command that runs a script of the repository, in the order of the document."""
    found = []
    for block in [*blocks_of(document), *blocks_of(document, "bash")]:
        for line in block.replace("\\\n", " ").splitlines():
            if script := re.search(r"^(?:torchrun|srun|python)\b.*?([\w/]+\.py)\b", line):
                found.append((script.group(1), shlex.split(line.split(script.group(1), 1)[1], comments=True)))
    return found


COMMANDS = [(document, script, arguments) for document in DOCUMENTS for script, arguments in commands_of(document)]


def first_job(arguments: list[str]) -> list[str]:
    """The arguments of a sweep's first job; of what is no sweep, the overrides."""
    if "--multirun" in arguments:
        return [argument.split(",")[0] for argument in arguments if argument != "--multirun"]
    return [argument for argument in arguments if argument not in ("--cfg", "job")]


def is_example(arguments: list[str]) -> bool:
    """Whether a command uses a loss or a dataset that a reader is told to add."""
    return "loss=hinge" in arguments


@pytest.mark.parametrize("document,script,arguments", COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_every_command_composes(document, script, arguments):
    assert (ROOT / script).exists()
    if script == "train.py" and not is_example(arguments):
        overrides = first_job(arguments)
        check_config(compose(*overrides), overrides)
    elif script in TOOLS:
        check_tool_config(compose(*arguments, name=script.removesuffix(".py")), TOOLS[script])


RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_every_row_of_a_recipe_composes(page):
    """The overrides in a table's cells, added to the page's last command of training by preferences before the table."""
    document, found = str(page.relative_to(ROOT)), 0
    base = [arguments for _, arguments in commands_of(document) if "loss=sft" not in arguments][0]
    for row in re.findall(r"^\|.*\|$", page.read_text(), re.MULTILINE):
        for given in re.findall(r"`([^`]*=[^`]*)`", row):
            if given.startswith(("model=", "loss=", "'", "loss.", "lr", "batch_size")) and not given.endswith("="):
                others = [argument for argument in base if not (given.startswith("loss=") and argument.startswith("loss"))]
                check_config(compose(*others, *shlex.split(given)))
                found += 1
    assert found or page.stem not in ("tdpo", "zephyr")


def test_documents_of_the_manual_open_with_a_command():
    for document in DOCUMENTS[1:]:
        lines = (ROOT / document).read_text().splitlines()
        assert lines[0].startswith("# ") and "```" in lines[1:8], document
    assert len((ROOT / "README.md").read_text().splitlines()) <= 190


def is_embedded(script: str, arguments: list[str]) -> bool:
    """Whether a command needs no download, no GPU and no file of the reader's; those of several processes are run elsewhere."""
    foreign = ("model=", "datasets=", "trainer=", "model.name_or_path=", "form=", "engine=vllm")
    named = [argument for argument in arguments if argument.startswith(foreign) and argument != "model=tiny"]
    return script in SHORT and not named and not is_example(arguments)


def call(script: str, arguments: list[str], monkeypatch) -> str:
    """Run a script's main in this process; what it prints."""
    spec = importlib.util.spec_from_file_location(f"documented_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if script == "experiments/spin.py":
        monkeypatch.setattr(module, "call", lambda inner, *own: call(inner, list(own), monkeypatch))
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None  # as in a new process
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main()
    return printed.getvalue()


def short(script: str, arguments: list[str]) -> list[str]:
    """The same command on little data."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    given |= dict(override.split("=", 1) for override in SHORT[script])
    return [*(argument for argument in arguments if "=" not in argument), *(f"{key}={value}" for key, value in given.items())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder `runs` that the README's commands make."""
    folder = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script, arguments in commands_of("README.md"):
            if is_embedded(script, arguments):
                call(script, short(script, arguments), patch)
    assert (folder / "runs" / "tdpo2" / "LATEST" / "hf").exists() and (folder / "curves.html").exists()
    return folder / "runs"


@pytest.mark.parametrize("document", DOCUMENTS[1:])
def test_commands_on_the_embedded_data_run(document, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    for script, arguments in commands_of(document):
        if is_embedded(script, arguments):
            own = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
            if "local_run_dir" in own and "resume" not in own:  # shown again
                shutil.rmtree(tmp_path / own["local_run_dir"], ignore_errors=True)
            assert call(script, short(script, arguments), monkeypatch) or script == "plot.py"


SEVERAL = [(document, arguments) for document, script, arguments in COMMANDS if script == "train.py"]
SEVERAL = [(document, arguments) for document, arguments in SEVERAL if not any(argument.startswith("model=") for argument in arguments)]
SEVERAL = [(document, arguments) for document, arguments in SEVERAL if any(argument.startswith("trainer=") for argument in arguments)]


@pytest.mark.parametrize("document,arguments", SEVERAL, ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_commands_of_several_processes_run(document, arguments, ranks, tmp_path):
    overrides = [argument for argument in short("train.py", arguments) if not argument.startswith("nproc_per_node")]
    assert (ranks(2).run(*overrides, f"local_run_dir={tmp_path}/run", f"local_dirs=[{tmp_path}]") / "LATEST").exists()


def test_the_example_of_another_loss(tmp_path, monkeypatch):
    """Its code and its config file, as they stand, train."""
    (code,), (config,) = (blocks_of("docs/adding_a_loss.md", language) for language in ("python", "yaml"))
    ((_, arguments),) = commands_of("docs/adding_a_loss.md")
    monkeypatch.setattr(losses, "OBJECTIVES", dict(losses.OBJECTIVES))
    before = set(vars(losses))
    exec(code, vars(losses))
    try:
        scores = {
            role: ResponseScores(torch.randn(4), torch.full((4,), 3), torch.randn(4), torch.rand(4)) for role in ("chosen", "rejected")
        }
        margin = scores["chosen"].log_ratio - scores["rejected"].log_ratio
        torch.testing.assert_close(get_objective("hinge", beta=0.1)(scores).losses, (1 - 0.1 * margin).clamp(min=0))
        (tmp_path / "loss").mkdir()
        (tmp_path / "loss" / "hinge.yaml").write_text(config)
        own = [argument for argument in short("train.py", arguments) if not argument.startswith("model.archive")]
        monkeypatch.chdir(tmp_path)
        printed = call("train.py", [*own, f"hydra.searchpath=[file://{tmp_path}]", f"local_run_dir={tmp_path}/run"], monkeypatch)
        assert "loss: hinge {'beta': 0.5}" in printed and "logits_eval/accuracies" in printed
    finally:
        for name in set(vars(losses)) - before:
            delattr(losses, name)


def test_the_example_of_another_dataset(tmp_path):
    (code,) = blocks_of("docs/adding_a_dataset.md", "python")
    space = dict(vars(preference_datasets))
    exec(code, space)
    rows = [{"question": "2 + 2?", "good": "4", "bad": "5"}, {"question": "3?", "good": "3", "bad": "3"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**preference_datasets.default_options("hh"), "path": str(tmp_path), "loader": "mine", "invalid_rows": "skip"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(preference_datasets.LOADERS, "mine", space["load_mine"])
        data = get_dataset("mine", "train", silent=True, options=options)
        assert data == {"2 + 2?": {"responses": [" 4", " 5"], "pairs": [(0, 1)], "sft_target": " 4"}}
        with pytest.raises(UserError, match="1 row of mine cannot be used|train.jsonl"):
            get_dataset("mine", "train", silent=True, options={**options, "invalid_rows": "error"})


def test_the_example_of_another_model():
    (config,) = blocks_of("docs/adding_a_model.md", "yaml")
    assert config == (ROOT / "config" / "model" / "qwen3_0_6b.yaml").read_text()


def test_names_for_forks_can_be_imported():
    text = (ROOT / "docs" / "forks.md").read_text()
    for module in ("trainers", "preference_datasets", "utils"):
        (names,) = re.findall(rf"^\| `{module}` \| (.*) \|$", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names):
            assert name in importlib.import_module(module).__all__, name


EXPERIMENTS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "experiments").glob("*/README.md"))]


@pytest.mark.parametrize("document", [*DOCUMENTS, "CONTRIBUTING.md", "benchmarks/README.md", *EXPERIMENTS])
def test_links_lead_somewhere(document):
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / document).read_text()):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_every_file_of_the_tree_exists():
    """The README's tree names files that are there, and all of the library's."""
    (tree,) = [block for block in blocks_of("README.md") if block.startswith("train.py")]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {path.name for path in (*ROOT.glob("*.py"), *(ROOT / "tdpo").rglob("*.py"))} - {"__init__.py"}
    assert named == there
