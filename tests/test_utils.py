"""The helpers of the published code: names, signatures and behaviour; and where log lines go."""

import inspect
import io
import logging
import random
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from helpers import MINI
from transformers import AutoModelForCausalLM

import preference_datasets
import utils
from tdpo.utils import get_logger, silenced

SIGNATURES = {
    utils: {
        "rank0_print": "args kwargs",
        "get_local_dir": "prefixes_to_resolve",
        "get_local_run_dir": "exp_name local_dirs",
        "slice_and_move_batch_for_device": "batch rank world_size device",
        "pad_to_length": "tensor length pad_value dim",
        "all_gather_if_needed": "values rank world_size",
        "disable_dropout": "model",
        "print_gpu_memory": "rank message",
        "get_block_class_from_model": "model block_class_name",
        "get_open_port": "",
        "TemporarilySeededRandom": "seed",
    },
    preference_datasets: {
        "extract_anthropic_prompt": "prompt_and_response",
        "strings_match_up_to_spaces": "str_a str_b",
        "get_hh": "split silent cache_dir",
        "get_shp": "split silent cache_dir",
        "get_se": "split silent cache_dir",
        "get_collate_fn": "tokenizer",
        "tokenize_batch_element": "prompt chosen rejected truncation_mode tokenizer max_length max_prompt_length",
    },
}


@pytest.mark.parametrize("module", SIGNATURES, ids=lambda module: module.__name__)
def test_published_functions_have_their_signatures(module):
    for name, parameters in SIGNATURES[module].items():
        assert list(inspect.signature(getattr(module, name)).parameters) == parameters.split(), name
        assert name in module.__all__


def test_slice_and_move_batch_for_device():
    batch = {"x": torch.arange(6), "texts": list("abcdef")}
    assert utils.slice_and_move_batch_for_device(batch, 1, 2, "cpu")["x"].tolist() == [3, 4, 5]
    assert utils.slice_and_move_batch_for_device(batch, 2, 4, "cpu")["texts"] == ["c"]


def test_temporarily_seeded_random_restores_the_state():
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    with utils.TemporarilySeededRandom(5):
        drawn = random.random(), np.random.rand()
    assert (random.random(), np.random.rand()) == expected
    with utils.TemporarilySeededRandom(5):
        assert (random.random(), np.random.rand()) == drawn


def test_block_class_by_name():
    model = AutoModelForCausalLM.from_pretrained(MINI / "model")
    assert utils.get_block_class_from_model(model, "GPTNeoXLayer") is type(model.gpt_neox.layers[0])
    with pytest.raises(ValueError, match="no module of class Layer"):
        utils.get_block_class_from_model(model, "Layer")


def test_texts_of_published_datasets():
    assert preference_datasets.extract_anthropic_prompt("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c") == (
        "\n\nHuman: a\n\nAssistant: b\n\nAssistant:"
    )
    assert preference_datasets.strings_match_up_to_spaces("a b c", "ab  c") and not preference_datasets.strings_match_up_to_spaces("a", "b")
    with pytest.raises(ValueError):
        preference_datasets.extract_anthropic_prompt("no dialogue")


def test_log_lines_go_where_the_streams_are_now():
    """Log lines go to streams that were replaced after the logger was created. Other ranks log only errors."""
    log = get_logger("trainers")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        log.info("a line")
        log.warning("look")
        log.error("bad")
        with silenced(True):
            log.warning("of another rank")
            log.error("its error")
        log.info("again")
    assert out.getvalue() == "a line\nwarning: look\nagain\n" and err.getvalue() == "error: bad\nerror: its error\n"
    assert log.name == "tdpo.trainers" and log.isEnabledFor(logging.INFO)
