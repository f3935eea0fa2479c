"""Fixtures. No test uses the network: models are built from their configs, data are local files."""

import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # set before the hub's client is imported, so that nothing waits for a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
WORKER = "PYTEST_XDIST_WORKER" in os.environ  # one of several pytest workers that share the cores
if WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # also for processes that tests start: results are bitwise equal only with equal numbers of threads

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import CHAT_TEMPLATE, MINI, Ranks  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: E402

import train  # noqa: E402

torch.set_num_threads(1 if WORKER else 2)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the ranks, and run tests that start processes first, because they take longest."""
    for item in items:
        if "ranks" in item.fixturenames:
            item.add_marker(pytest.mark.processes)
    slow = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name != "processes"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """A function that returns n ranks (helpers.Ranks), started at the first call with that n."""
    started: dict[int, Ranks] = {}

    def of(n: int) -> Ranks:
        if n not in started:
            started[n] = Ranks(n, tmp_path_factory.mktemp("ranks"))
        return started[n]

    yield of
    for each in started.values():
        each.end()


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that calls train.py's main with arguments and returns (exit code, standard output, standard error)."""

    def call(*arguments: str):
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None  # as in a new process
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            train.main()
            code = 0
        except SystemExit as exit:
            code = exit.code
        finally:
            signal.signal(signal.SIGINT, interrupt)  # a command that ends with an error ignores it from then on
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def mini_tokenizer():
    return AutoTokenizer.from_pretrained(MINI / "model")


@pytest.fixture(scope="session")
def chat_tokenizer():
    """A tokenizer with one token per ASCII character, whose end of sequence, <|end|>, is also the template's end of turn."""
    vocabulary = {"<unused>" if i == 10 else chr(i): i for i in range(127)} | {"\n": 127, "<|start|>": 128, "<|end|>": 129, "<|bos|>": 130}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", bos_token="<|bos|>", pad_token="<|end|>", extra_special_tokens=["<|start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
