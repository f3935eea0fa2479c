"""Recorded runs of the published code (tests/golden/README.md), reproduced with the same config keys."""

import hashlib
import itertools
import json
import os
import subprocess
import sys

import pytest
from helpers import GOLDEN, ROOT, assert_recorded_logs, needs_shared, recorded, run
from transformers import AutoTokenizer

from preference_datasets import default_options, get_batch_iterator, tokenize_batch_element

NAMES = ["sft", "tdpo1", "tdpo2", "dpo", "ipo"]
SHARED = GOLDEN.parent
ON_HH = GOLDEN, GOLDEN / "tiny-neox", SHARED / "data" / "hh-rlhf"


@pytest.mark.parametrize("name", NAMES)
def test_mini(name, tmp_path):
    golden, arguments = recorded(name)
    run_dir = run(*arguments, f"local_run_dir={tmp_path}/run")
    assert_recorded_logs(golden, run_dir)


@pytest.mark.parametrize("name", ["sft", "tdpo2", "ipo"])
def test_mini_plain(name, tmp_path):
    """With scoring as in the published code; test_mini uses fast scoring."""
    golden, arguments = recorded(name)
    run_dir = run(*arguments, "scoring=plain", f"local_run_dir={tmp_path}/run")
    assert_recorded_logs(golden, run_dir)


@pytest.mark.parametrize("tokens", [1, 200, 10_000])
def test_mini_with_tokens_per_microbatch(tokens, tmp_path):
    golden, arguments = recorded("tdpo2")
    cut = [f"tokens_per_microbatch={tokens}", "scoring=fast", f"local_run_dir={tmp_path}/run"]
    assert_recorded_logs(golden, run(*arguments, *cut))


@pytest.mark.parametrize("name", NAMES)
def test_mini_with_other_microbatches(name, tmp_path):
    """Training does not depend on how a batch is cut into microbatches, nor the eval on its batch size."""
    golden, arguments = recorded(name)
    cut = ["gradient_accumulation_steps=8", "eval_batch_size=5", f"local_run_dir={tmp_path}/run"]
    assert_recorded_logs(golden, run(*arguments, *cut))


@pytest.mark.processes
def test_the_command_itself(tmp_path):
    """train.py in a process of its own, from another folder, without a network. Its last line names the run's folder."""
    golden, arguments = recorded("tdpo2")
    quiet = [
        "exp_name=x",
        f"local_run_dir={tmp_path}/run",
        "wandb.enabled=false",
        "sample_during_eval=false",
        "minimum_log_interval_secs=0",
    ]
    command = [sys.executable, "-u", str(ROOT / "train.py"), *arguments, *quiet]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"done: {tmp_path}/run"
    assert sorted(os.listdir(tmp_path)) == ["run"]  # no outputs/, no log file of Hydra, no cache
    assert_recorded_logs(golden, tmp_path / "run")


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_hh_rows(name, tmp_path):
    golden, arguments = recorded(name, *ON_HH)
    assert_recorded_logs(golden, run(*arguments, f"local_run_dir={tmp_path}/run"))


@needs_shared
def test_hh_rows_with_other_microbatches_and_a_reference_cache(tmp_path):
    golden, arguments = recorded("tdpo2", *ON_HH)
    other = ["tokens_per_microbatch=1000", "reference_cache=true", f"local_dirs=[{tmp_path}]", f"local_run_dir={tmp_path}/run"]
    assert_recorded_logs(golden, run(*arguments, *other))


@needs_shared
def test_tokenization_of_recorded_elements():
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tiny-neox")
    for case in json.loads((GOLDEN / "tokenize_batch_element.json").read_text()):
        expected = case["element"]
        texts = (expected["prompt"], expected["chosen_response_only"], expected["rejected_response_only"])
        lengths = (case["max_length"], case["max_prompt_length"])
        assert tokenize_batch_element(*texts, case["truncation_mode"], tokenizer, *lengths) == expected


@needs_shared
@pytest.mark.parametrize("kind", ["pairs", "sft"])
def test_recorded_order_of_examples(kind):
    golden = json.loads((GOLDEN / "batch_order.json").read_text())[kind]
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tiny-neox")
    options = {"hh": {**default_options("hh"), "path": str(SHARED / "data" / "hh-rlhf")}}
    lengths = {"max_length": 128, "max_prompt_length": 64, "batch_size": 16}
    batches = list(get_batch_iterator(options, tokenizer, "test", sft_mode=kind == "sft", n_epochs=2, seed=3, silent=True, **lengths))
    texts = itertools.chain.from_iterable(batch["chosen"] for batch in batches)
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts] == golden["chosen_text_sha256_16"]
    assert [list(batch["chosen_input_ids"].shape) for batch in batches] == golden["chosen_input_ids_shapes"]
