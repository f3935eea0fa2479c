"""Training with the reference's hidden states from disk gives the same numbers as training with the reference model."""

import getpass
import json
import os
import re
import shutil
import signal
from collections import namedtuple

import pytest
import torch
from helpers import MINI, PREFERENCE, TIMES, assert_recorded_logs, logs_of, losses_of, recorded, run, weights_of

from tdpo.scoring.scorer import Scorer
from tdpo.training import reference_cache
from tdpo.training.hooks import CachedReference
from tdpo.utils import RunError, Stopped, UserError


@pytest.fixture
def options(tmp_path):
    return [*PREFERENCE, f"local_dirs=[{tmp_path}/cache]"]


def files(tmp_path) -> set[str]:
    return {file.name for file in (tmp_path / "cache").glob("*/reference/*")}


@pytest.mark.parametrize(
    "loss,mp,archive", [("dpo", "null", None), ("tdpo2", "bfloat16", None), ("tdpo2", "null", "null"), ("dpo", "null", "folder")]
)
def test_cached_and_live_reference_are_equal_bit_by_bit(loss, mp, archive, options, tmp_path):
    """In the microbatches in which the states were computed: those of the first epoch, and of an eval. With weights of a policy.pt, of the
    model itself, and of a Hugging Face folder."""
    if archive:
        options += [f"model.archive={MINI / 'model' if archive == 'folder' else 'null'}"]
    options += [f"loss={loss}", f"model.fsdp_policy_mp={mp}", "gradient_accumulation_steps=4", "eval_every=48", "n_epochs=1"]
    live = run(*options, f"local_run_dir={tmp_path}/live")
    cached = run(*options, "reference_cache=true", f"local_run_dir={tmp_path}/cached")
    first, second = (losses_of(run_dir) for run_dir in (live, cached))
    assert first == second
    assert all(torch.equal(tensor, weights_of(cached)[name]) for name, tensor in weights_of(live).items())


@pytest.mark.parametrize("name", ["tdpo2", "ipo"])
def test_recorded_runs_with_a_reference_cache(name, tmp_path):
    """The second run uses other microbatches than those in which the states were computed."""
    golden, arguments = recorded(name)
    arguments += [f"local_dirs=[{tmp_path}/cache]", "reference_cache=true"]
    run(*arguments, f"local_run_dir={tmp_path}/first", "tokens_per_microbatch=1")
    assert_recorded_logs(golden, run(*arguments, f"local_run_dir={tmp_path}/second"))
    assert len(files(tmp_path)) == 2


def test_a_second_run_and_later_epochs_use_the_cache(options, tmp_path, capsys, monkeypatch):
    options += ["reference_cache=true", "n_epochs=2", "eval_every=96"]
    first = run(*options, f"local_run_dir={tmp_path}/first")
    printed = capsys.readouterr().out
    (positions,) = re.findall(r"reference cache, train: 96 examples, ([\d,]+) positions x 32 numbers x 4 bytes = 0.[3-9] MB", printed)
    sizes = {file.stat().st_size for file in (tmp_path / "cache").glob("*/reference/*")}
    assert int(positions.replace(",", "")) * 32 * 4 + reference_cache.DIGEST in sizes and "found" not in printed

    def refusing(self, rows):
        raise AssertionError("computed again")

    monkeypatch.setattr(Scorer, "reference_states", refusing)
    second = run(*options, f"local_run_dir={tmp_path}/second")
    assert capsys.readouterr().out.count("; found") == 2
    assert logs_of(first)[-1] == logs_of(second)[-1]
    live = run(*options, "reference_cache=false", f"local_run_dir={tmp_path}/live")
    for log, expected in zip(logs_of(second), logs_of(live)):
        for key in expected.keys() - {"split", *TIMES}:
            assert log[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5)


def test_batches_that_do_not_divide_an_epoch(options, tmp_path):
    """The second epoch has examples that were dropped from the first one."""
    options += ["batch_size=36", "n_epochs=2", "eval_every=72"]
    live, cached = (run(*options, f"reference_cache={x}", f"local_run_dir={tmp_path}/{x}") for x in ("false", "true"))
    for log, expected in zip(logs_of(cached), logs_of(live), strict=True):
        for key in expected.keys() - {"split", *TIMES}:
            assert log[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5)


def test_another_model_with_the_same_weights_gets_its_own_cache(options, tmp_path):
    model = shutil.copytree(MINI / "model", tmp_path / "model")
    options += ["reference_cache=true", "n_examples=8", f"model.name_or_path={model}"]
    run(*options, f"local_run_dir={tmp_path}/a")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_attention_heads": config["num_attention_heads"] // 2}))
    run_dir = run(*options, f"local_run_dir={tmp_path}/b")
    assert len(files(tmp_path)) == 4 and logs_of(run_dir)[0]["kl_eval/chosen"] == 0


def test_other_weights_or_data_get_their_own_cache(options, tmp_path):
    options += ["reference_cache=true", "n_epochs=1"]
    run(*options, f"local_run_dir={tmp_path}/a")
    assert len(files(tmp_path)) == 2
    run(*options, "loss=dpo", "seed=1", f"local_run_dir={tmp_path}/b")  # another loss, another order: the same cache
    assert len(files(tmp_path)) == 2
    run(*options, f"model.archive={tmp_path}/a/LATEST/policy.pt", f"local_run_dir={tmp_path}/c")
    assert len(files(tmp_path)) == 4
    run(*options, "max_length=60", f"local_run_dir={tmp_path}/d")
    assert len(files(tmp_path)) == 6


def test_a_rank_that_does_not_see_the_file_is_an_error(options, tmp_path, monkeypatch):
    """It raises an error, and creates no file of its own."""
    exists = os.path.exists
    monkeypatch.setattr(reference_cache.os.path, "exists", lambda path: exists(path) and not str(path).endswith(".new"))
    with pytest.raises(UserError, match="does not see .*: local_dirs must name a disk that all ranks see"):
        run(*options, "reference_cache=true", "n_examples=8", f"local_run_dir={tmp_path}/run")


def flip_a_bit(file) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def zero_a_page(file) -> None:
    with open(file, "r+b") as handle:
        handle.seek(file.stat().st_size // 2)
        handle.write(bytes(512))


DAMAGES = {
    "another size": lambda file: os.truncate(file, 100),
    "no hash, as in earlier versions": lambda file: os.truncate(file, file.stat().st_size - reference_cache.DIGEST),
    "a flipped bit": flip_a_bit,
    "a zeroed page": zero_a_page,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(damage, options, tmp_path, capsys):
    options += ["reference_cache=true", "n_examples=8"]
    expected = run(*options, f"local_run_dir={tmp_path}/a")
    for file in list((tmp_path / "cache").glob("*/reference/*")):
        DAMAGES[damage](file)
    again = run(*options, f"local_run_dir={tmp_path}/b")
    printed = capsys.readouterr().out
    assert "found" not in printed and printed.count("is damaged, or of an earlier version without a hash") == 2
    assert losses_of(again) == losses_of(expected)
    run(*options, f"local_run_dir={tmp_path}/c")
    assert capsys.readouterr().out.count("; found") == 2


def test_only_the_head_stays_in_memory(options, tmp_path, monkeypatch):
    trainers = []
    before_training = CachedReference.before_training

    def noted(self):
        reference = self.passes.scorer.reference
        before_training(self)
        trainers.append((self.passes, reference))

    monkeypatch.setattr(CachedReference, "before_training", noted)
    sampled = ["sample_during_eval=true", "n_eval_model_samples=2", "n_examples=8"]
    run_dir = run(*options, *sampled, "reference_cache=true", f"local_run_dir={tmp_path}/run")
    ((trainer, reference),) = trainers
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in reference.parameters())
    assert sum(tensor.numel() for tensor in trainer.scorer.reference.state_dict().values()) == 300 * 32
    assert not list(trainer.scorer.reference.parameters())
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert rows and all(set(row) == {"counters/examples", "prompt", "policy"} for row in rows)


def test_a_disk_that_is_too_small_is_an_error(options, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(reference_cache.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 10**5, 10**5))
    with pytest.raises(
        UserError, match=r"needs 0.[3-9] MB in .*; 0.1 MB are free\nset local_dirs to a larger disk, or reference_cache=false"
    ):
        run(*options, "reference_cache=true", f"local_run_dir={tmp_path}/run")
    assert not files(tmp_path)


@pytest.mark.parametrize("how", ["signal", "error"])
def test_an_interrupted_computation_leaves_no_file(how, options, tmp_path, monkeypatch):
    compute, calls = Scorer.reference_states, []

    def interrupted(self, rows):
        calls.append(rows)
        if len(calls) == 3:
            if how == "error":
                raise RunError("out of memory")
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, rows)

    monkeypatch.setattr(Scorer, "reference_states", interrupted)
    with pytest.raises(Stopped if how == "signal" else RunError):
        run(*options, "reference_cache=true", f"local_run_dir={tmp_path}/run")
    assert not files(tmp_path)


def test_two_runs_at_once_do_not_interfere(options, tmp_path, monkeypatch):
    """While one writes, another one starts and ends. The file of a killed run is removed, that of a running one is not."""
    compute, inner = Scorer.reference_states, []
    folder = tmp_path / "cache" / getpass.getuser() / "reference"

    def meanwhile(self, rows):
        if not inner:
            inner.append(True)
            (own,) = folder.glob("*.new")
            own.rename(living := folder / own.name.replace(str(os.getpid()), "1"))  # as if process 1 wrote it
            (left := folder / own.name.replace(str(os.getpid()), str(2**22 + 1))).touch()
            inner.append(run(*options, "reference_cache=true", "n_examples=16", f"local_run_dir={tmp_path}/inner"))
            assert living.exists() and not left.exists()
            living.rename(own)
        return compute(self, rows)

    monkeypatch.setattr(Scorer, "reference_states", meanwhile)
    outer = run(*options, "reference_cache=true", "n_examples=16", f"local_run_dir={tmp_path}/outer")
    assert losses_of(outer) == losses_of(inner[1])
    assert len(files(tmp_path)) == 2


def test_the_cache_needs_fast_scoring(options, tmp_path, monkeypatch):
    options += ["reference_cache=true", "n_examples=8", f"local_run_dir={tmp_path}/run"]
    with pytest.raises(UserError, match="reference_cache=true needs fast scoring; use scoring=auto"):
        run(*options, "scoring=plain")
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patched, pytest.raises(UserError, match="reference_cache=true needs fast scoring, which this model"):
        patched.setattr("tdpo.training.guards.fast_scoring_problem", lambda *_: "its logits are odd")
        run(*options)
    run(*options)  # the failed attempts left no run in the folder


def test_sft_writes_no_cache(options, tmp_path):
    run(*options, "loss=sft", "n_examples=8", "reference_cache=true", f"local_run_dir={tmp_path}/run")
    assert not files(tmp_path)
