"""Runs of the published code, recorded (tests/golden/README.md), reproduced through the command line's config."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MINI, ROOT, run
from transformers import AutoTokenizer

from preference_datasets import default_options, get_batch_iterator, tokenize_batch_element

RELATIVE, ABSOLUTE = 1e-4, 1e-5
NAMES = ["sft", "tdpo1", "tdpo2", "dpo", "ipo"]
KEYS = (
    "seed batch_size eval_batch_size lr gradient_accumulation_steps max_grad_norm max_length max_prompt_length n_examples "
    "n_eval_examples optimizer warmup_steps eval_every do_first_eval"
).split()
SHARED = ROOT.parent / "shared"
GOLDEN = SHARED / "golden"
needs_shared = pytest.mark.skipif(
    not (GOLDEN / "tiny-neox").is_dir(), reason=f"the recorded runs on HH rows are not part of the repository: no {GOLDEN}"
)


def overrides(golden: dict, folder: Path, model: Path, data: Path) -> list[str]:
    """The command line of a recorded run."""
    config, loss = golden["config"], dict(golden["config"]["loss"])
    name = loss.pop("name")
    if name == "ipo":  # the published IPO takes beta alone
        loss = {"beta": loss["beta"]}
    arguments = [f"{key}={config[key]}" for key in KEYS]
    arguments += ["model=blank_model", f"model.name_or_path={model}", "datasets=[hh]", f"datasets.hh.path={data}", "n_epochs=null"]
    arguments += [f"loss={name}", *(f"loss.{key}={value}" for key, value in loss.items())]
    return arguments if name == "sft" else [*arguments, f"model.archive={folder}/sft_policy.pt"]


def assert_same_logs(golden: dict, run_dir: Path) -> None:
    """Every metric of every recorded log. Ours has one eval more, after the last step."""
    logs = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for split in ("train", "eval"):
        ours = [log for log in logs if log["split"] == split]
        assert len(ours) == len(golden[split]) + (split == "eval")
        for i, (expected, actual) in enumerate(zip(golden[split], ours)):
            for key, value in expected.items():
                noise = key.endswith("/accuracies") and abs(expected[key.replace("accuracies", "margins")]) < 1e-6
                if key != "step_examples" and not noise:
                    assert actual[key] == pytest.approx(value, rel=RELATIVE, abs=ABSOLUTE), f"{split} log {i} {key}"


@pytest.mark.parametrize("name", NAMES)
def test_mini(name, tmp_path):
    golden = json.loads((MINI / f"{name}.json").read_text())
    run_dir = run(*overrides(golden, MINI, MINI / "model", MINI / "data"), f"local_run_dir={tmp_path}/run")
    assert_same_logs(golden, run_dir)


@pytest.mark.parametrize("name", ["sft", "tdpo2", "ipo"])
def test_mini_plain(name, tmp_path):
    """Scored as published; test_mini scores fast."""
    golden = json.loads((MINI / f"{name}.json").read_text())
    run_dir = run(*overrides(golden, MINI, MINI / "model", MINI / "data"), "scoring=plain", f"local_run_dir={tmp_path}/run")
    assert_same_logs(golden, run_dir)


@pytest.mark.parametrize("tokens", [1, 200, 10_000])
def test_mini_with_so_many_tokens_a_microbatch(tokens, tmp_path):
    golden = json.loads((MINI / "tdpo2.json").read_text())
    cut = [f"tokens_per_microbatch={tokens}", "scoring=fast", f"local_run_dir={tmp_path}/run"]
    assert_same_logs(golden, run(*overrides(golden, MINI, MINI / "model", MINI / "data"), *cut))


@pytest.mark.parametrize("name", NAMES)
def test_mini_with_another_cut_of_the_batch(name, tmp_path):
    """The trajectory does not depend on how a batch is cut into microbatches, nor the eval on its batch size."""
    golden = json.loads((MINI / f"{name}.json").read_text())
    cut = ["gradient_accumulation_steps=8", "eval_batch_size=5", f"local_run_dir={tmp_path}/run"]
    assert_same_logs(golden, run(*overrides(golden, MINI, MINI / "model", MINI / "data"), *cut))


def test_the_command_itself(tmp_path):
    """train.py as a process, from another folder, without a network; its last line names the run's folder."""
    golden = json.loads((MINI / "tdpo2.json").read_text())
    quiet = [
        "exp_name=x",
        f"local_run_dir={tmp_path}/run",
        "wandb.enabled=false",
        "sample_during_eval=false",
        "minimum_log_interval_secs=0",
    ]
    arguments = [sys.executable, "-u", str(ROOT / "train.py"), *overrides(golden, MINI, MINI / "model", MINI / "data"), *quiet]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"done: {tmp_path}/run"
    assert sorted(os.listdir(tmp_path)) == ["run"]  # no outputs/, no log of Hydra's, no cache
    assert_same_logs(golden, tmp_path / "run")


@needs_shared
@pytest.mark.parametrize("name", NAMES)
def test_hh_rows(name, tmp_path):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    data = SHARED / "data" / "hh-rlhf"
    assert_same_logs(golden, run(*overrides(golden, GOLDEN, GOLDEN / "tiny-neox", data), f"local_run_dir={tmp_path}/run"))


@needs_shared
def test_hh_rows_in_another_cut_from_a_reference_cache(tmp_path):
    golden = json.loads((GOLDEN / "tdpo2.json").read_text())
    arguments = overrides(golden, GOLDEN, GOLDEN / "tiny-neox", SHARED / "data" / "hh-rlhf")
    other = ["tokens_per_microbatch=1000", "reference_cache=true", f"local_dirs=[{tmp_path}]", f"local_run_dir={tmp_path}/run"]
    assert_same_logs(golden, run(*arguments, *other))


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
