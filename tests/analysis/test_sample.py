"""sample.py: writes the same file after interruptions and with any number of processes, and rejects invalid input."""

import fcntl
import json

import pytest
from helpers import DATA, compose, run, start_supervised, start_unsupervised

import sample
from tdpo.models.sampling import text_of
from tdpo.utils import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return run(*DATA, "n_examples=8", "do_first_eval=false", f"local_run_dir={folder}/run")


def sampled(trained, out, *overrides) -> str:
    options = [f"run={trained}", f"out={out}", "n_prompts=10", "n=2", "batch_size=4", "max_new_tokens=6", *overrides]
    with open(sample.run(compose(*options, name="sample"))) as file:
        return file.read()


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    return sampled(trained, tmp_path_factory.mktemp("whole") / "samples.jsonl")


def test_rows(whole, mini_tokenizer):
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(row["index"], row["sample"]) for row in rows] == [(i, j) for i in range(10) for j in range(2)]
    assert all(0 < len(row["completion_ids"]) <= 6 and len(row["prompt_ids"]) <= 32 for row in rows)
    assert all(row["completion"] == text_of(mini_tokenizer, row["prompt_ids"], row["completion_ids"]) for row in rows)
    assert len({tuple(row["completion_ids"]) for row in rows}) > 15  # random, not the same for each prompt


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.99])
def test_interrupted_file_is_resumed(share, trained, whole, tmp_path):
    """Also if the file ends in the middle of a line."""
    out = tmp_path / "samples.jsonl"
    sampled(trained, out)
    out.write_text(whole[: int(share * len(whole))])
    assert sampled(trained, out) == whole
    assert sampled(trained, out) == whole  # nothing is left to do


def test_several_processes_write_the_same(ranks, trained, whole, tmp_path):
    options = [f"run={trained}", f"out={tmp_path}/samples.jsonl", "n_prompts=10", "n=2", "batch_size=4", "max_new_tokens=6"]
    ranks(2).call("sample", *options)
    assert (tmp_path / "samples.jsonl").read_text() == whole


def test_other_settings_are_rejected(trained, whole, tmp_path):
    out = tmp_path / "samples.jsonl"
    sampled(trained, out)
    with pytest.raises(UserError, match=r"was started with different settings \(seed, temperature\): give out="):
        sampled(trained, out, "seed=1", "temperature=0.5")
    assert out.read_text() == whole
    (tmp_path / "samples.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="exists but was not written by sample.py"):
        sampled(trained, out)


def test_beam_search_is_deterministic(trained, tmp_path):
    first, second = (sampled(trained, tmp_path / f"{seed}.jsonl", "num_beams=3", f"seed={seed}") for seed in (0, 1))
    assert first == second
    texts = [json.loads(line)["completion_ids"] for line in first.splitlines()]
    assert all(texts[i] != texts[i + 1] for i in range(0, len(texts), 2))  # the best two
    with pytest.raises(UserError, match="n=4 is more than num_beams=3"):
        sampled(trained, tmp_path / "x.jsonl", "num_beams=3", "n=4")


def test_prompts_from_a_file(trained, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Human: hello"}\n{"prompt": "Human: what"}\n')
    rows = sampled(trained, tmp_path / "out.jsonl", f"prompts={tmp_path}/prompts.jsonl").splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == ["Human: hello"] * 2 + ["Human: what"] * 2
    hf = trained / "LATEST" / "hf"
    again = sampled(hf, tmp_path / "hf.jsonl", f"prompts={tmp_path}/prompts.jsonl", "max_length=64", "max_prompt_length=32").splitlines()
    assert again == rows  # the same weights
    with pytest.raises(UserError, match="is not a run folder, so its datasets are unknown: give datasets="):
        sampled(hf, tmp_path / "y.jsonl", "max_length=64", "max_prompt_length=32")


def test_path_without_a_model(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        sampled(tmp_path / "x", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="is not a run folder, a checkpoint or a Hugging Face folder"):
        sampled(tmp_path, tmp_path / "out.jsonl")


def test_prompts_that_cannot_be_continued(trained, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Human: hello"}\n{"prompt": ""}\n')
    with pytest.raises(UserError, match="no tokens in prompt 2 "):
        sampled(trained, tmp_path / "out.jsonl", f"prompts={prompts}")
    prompts.write_text('{"text": "Human: hello"}\n')
    with pytest.raises(UserError, match=r"no field 'prompt' .it has .*\n  fix or remove them"):
        sampled(trained, tmp_path / "out.jsonl", f"prompts={prompts}")
    with pytest.raises(UserError, match="max_prompt_length=32 leaves no room for a response: it must be below max_length=8"):
        sampled(trained, tmp_path / "out.jsonl", "max_length=8")


def test_one_process_at_a_time(trained, whole, tmp_path):
    out = tmp_path / "samples.jsonl"
    sampled(trained, out)
    with open(f"{out}.settings.json") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            sampled(trained, out)
    assert out.read_text() == whole


@pytest.mark.processes
@pytest.mark.parametrize("start_as", [start_unsupervised, start_supervised])
def test_error_of_several_ranks_is_printed_once(start_as, tmp_path):
    ranks = start_as("sample.py", ["run=/nope", f"out={tmp_path}/out.jsonl"])
    output = "".join(rank.communicate(timeout=60)[0] for rank in ranks)
    assert all(rank.returncode for rank in ranks)
    assert [line for line in output.splitlines() if line.startswith("error: ")] == ["error: run=/nope: no such folder"]
