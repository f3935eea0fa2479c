"""Runs that are stopped, damaged or extended, and then resumed: they give the same results as uninterrupted runs, or are refused."""

import copy
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
import wandb
from helpers import DATA, MINI, PREFERENCE, SHARDED, TIMES, assert_same_run, compose, copied, logs_of, losses_of, run, weights_of
from omegaconf import OmegaConf

from tdpo.checkpointing import resume
from tdpo.data.batching import BatchStream
from tdpo.files import entry_of
from tdpo.losses import get_objective
from tdpo.utils import RunError, Stopped, UserError
from trainers import BasicTrainer


@pytest.mark.parametrize("where,signum", [("train", signal.SIGTERM), ("eval", signal.SIGUSR1), ("sample", signal.SIGINT)])
def test_a_signal_saves_the_current_step(where, signum, tmp_path, monkeypatch):
    options = [*PREFERENCE, "n_examples=48", "eval_every=24", "eval_batch_size=4", "n_eval_examples=8"]
    options += ["sample_during_eval=true", "n_eval_model_samples=8"]
    straight = run(*options, f"local_run_dir={tmp_path}/straight")
    handler = signal.getsignal(signum)
    method = {"train": "train_step", "eval": "score", "sample": "generate"}[where]
    original = getattr(BasicTrainer, method)

    def interrupted(self, *arguments):
        if self.progress.examples == 24 and not self.signals.received and not (method == "score" and arguments[-1] == "train"):
            os.kill(os.getpid(), signum)
        return original(self, *arguments)

    monkeypatch.setattr(BasicTrainer, method, interrupted)
    with pytest.raises(Stopped) as stopped:
        run(*options, f"local_run_dir={tmp_path}/run")
    assert stopped.value.signum == signum
    monkeypatch.undo()
    assert os.readlink(tmp_path / "run" / "LATEST") == ("step-32" if where == "train" else "step-24")
    assert signal.getsignal(signum) == handler
    assert_same_run(run(*options, f"resume={tmp_path}/run"), straight)


def test_resume_with_another_number_of_ranks_and_another_trainer(ranks, tmp_path):
    """Two ranks, one, four, tensor parallelism, BasicTrainer, one after another: the metrics are those of a run by one process."""
    options = [*PREFERENCE, "n_epochs=null", "eval_every=40", "n_eval_examples=7"]
    straight = run(*options, "n_examples=120", f"local_run_dir={tmp_path}/straight")
    first = ranks(2).run(*options, *SHARDED, "n_examples=24", f"local_run_dir={tmp_path}/run")
    for trainer, make, replicas, examples in (
        ("FSDPTrainer", run, 1, 48),
        ("FSDPTrainer", ranks(4).run, 2, 72),
        ("TensorParallelTrainer", ranks(2).run, 1, 96),
        ("BasicTrainer", run, 1, 120),
    ):
        make(*options, f"trainer={trainer}", f"parallel.replicas={replicas}", f"n_examples={examples}", f"resume={first}")
    ours, theirs = logs_of(first, "train"), logs_of(straight, "train")
    assert [log["counters/examples"] for log in ours] == [log["counters/examples"] for log in theirs]
    evals = {log["counters/examples"]: log for log in logs_of(straight, "eval")}
    for log, expected in [*zip(ours, theirs), *((log, evals[log["counters/examples"]]) for log in logs_of(first, "eval")[:1])]:
        for name, value in expected.items():
            if name != "split" and name not in TIMES and not name.endswith("accuracies"):
                assert log[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (log["counters/examples"], name)


def test_every_example_is_seen_once_per_epoch(tmp_path, monkeypatch):
    """A run that stops in its second epoch and is resumed sees the same ids in the same order as an uninterrupted one."""
    seen = []
    step = BasicTrainer.train_step

    def recorded(self, examples, microbatches):
        seen.append([self.data["train"].element(example)["example_id"] for example in examples])
        return step(self, examples, microbatches)

    monkeypatch.setattr(BasicTrainer, "train_step", recorded)
    run(*PREFERENCE, "n_epochs=3", f"local_run_dir={tmp_path}/straight")
    straight, seen[:] = list(seen), []
    run(*PREFERENCE, "n_epochs=null", "n_examples=136", f"local_run_dir={tmp_path}/run")
    run(*PREFERENCE, "n_epochs=3", f"resume={tmp_path}/run")
    assert seen == straight and len(seen) == 36
    ids = [example for batch in seen for example in batch]
    assert {ids.count(example) for example in ids} == {3} and len(set(ids)) == 96


def test_the_batch_stream_resumes_after_any_batch():
    class Split:
        def __len__(self):
            return 10

        epoch_size = 10

        def train_epochs(self, seed, shuffle):
            order = list(range(10))
            while True:
                random.Random(seed).shuffle(order)
                yield list(order)

    for drop_last in (True, False):
        stream = BatchStream(Split(), 4, 1, n_epochs=3, drop_last=drop_last)
        for n in range(len(stream) + 1):
            assert list(stream.after(n)) == list(stream)[n:]


def test_a_finished_run_can_be_extended_and_is_otherwise_unchanged(tmp_path):
    run_dir = run(*DATA, "n_epochs=1", f"local_run_dir={tmp_path}/run")
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "LATEST").rglob("*") if path.is_file()}
    run(*DATA, "n_epochs=1", f"resume={run_dir}")
    assert before == {path: path.stat().st_mtime_ns for path in (run_dir / "LATEST").rglob("*") if path.is_file()}
    straight = run(*DATA, "n_epochs=2", f"local_run_dir={tmp_path}/straight")
    run(*DATA, "n_epochs=2", f"resume={run_dir}")
    end_of_first = [log for log in losses_of(run_dir) if log["split"] == "eval"][1]
    assert [log for log in losses_of(run_dir) if log != end_of_first] == losses_of(straight) and os.listdir(run_dir / "LATEST" / "hf")
    assert all(torch.equal(tensor, weights_of(straight)[name]) for name, tensor in weights_of(run_dir).items())


def test_a_run_that_was_stopped_in_its_last_eval_gets_its_export(tmp_path, monkeypatch):
    """At that time the checkpoint of the last step has no hf/ yet."""
    score = BasicTrainer.score

    def interrupted(self, examples, sums, split):
        if split == "eval" and self.progress.examples == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, examples, sums, split)

    monkeypatch.setattr(BasicTrainer, "score", interrupted)
    with pytest.raises(Stopped):
        run(*DATA, "n_examples=16", "eval_batch_size=4", f"local_run_dir={tmp_path}/run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "step-16" / "hf").exists()
    run_dir = run(*DATA, "n_examples=16", "eval_batch_size=4", f"resume={tmp_path}/run")
    assert (run_dir / "step-16" / "hf" / "config.json").exists() and len(logs_of(run_dir, "eval")) == 2


TIED = ["model.from_config.model_type=gpt2", "model.block_name=GPT2Block", "n_eval_examples=4", "lr=1e-3", "batch_size=8"]


@pytest.mark.parametrize("model", [DATA, TIED], ids=["", "tied weights"])
def test_optimizer_state_and_learning_rate_are_resumed(model, tmp_path):
    """With AdamW, which has more state than RMSprop, and during warm-up."""
    options = [*model, "optimizer=AdamW", "warmup_steps=8", "save_every=8", "n_epochs=null"]
    straight = run(*options, "n_examples=64", f"local_run_dir={tmp_path}/straight")
    run_dir = run(*options, "n_examples=32", f"local_run_dir={tmp_path}/run")
    run(*options, "n_examples=64", f"resume={run_dir}")
    assert [log["lr"] for log in logs_of(run_dir, "train")] == [log["lr"] for log in logs_of(straight, "train")]
    assert all(torch.equal(tensor, weights_of(straight)[name]) for name, tensor in weights_of(run_dir).items())


SHORT = [*PREFERENCE, "n_epochs=null", "n_examples=32", "save_every=8", "n_eval_examples=4"]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    return run(*SHORT, f"local_run_dir={tmp_path_factory.mktemp('short')}/run")


@pytest.fixture
def run_dir(made_once, tmp_path) -> Path:
    """A copy of a run's folder with four checkpoints."""
    return copied(made_once, tmp_path / "run")


def damage_bytes(folder: Path) -> None:
    path = next((folder / "state").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_bytes,
        lambda folder: (folder / "policy.pt").write_bytes(b""),
        lambda folder: (folder / "state" / "progress.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
    ],
    ids=["bytes", "empty", "missing", "manifest"],
)
def test_a_damaged_checkpoint_is_skipped(damage, capsys, run_dir):
    straight = losses_of(run_dir), weights_of(run_dir)
    damage(run_dir / "step-32")
    (run_dir / "step-999999").mkdir()
    run(*SHORT, f"resume={run_dir}")
    printed = capsys.readouterr().out
    assert f"warning: {run_dir}/step-32 is damaged" in printed and f"resumed from {run_dir}/step-24" in printed
    assert "step-999999 is not a complete checkpoint" in printed and (run_dir / "step-32.old").is_dir()
    assert losses_of(run_dir) == straight[0]
    assert all(torch.equal(tensor, straight[1][name]) for name, tensor in weights_of(run_dir).items())


def test_another_config_is_refused_and_its_keys_are_named(run_dir):
    before = sorted(path for path in run_dir.rglob("*"))
    with pytest.raises(UserError, match=r"is a run with another config: seed=3 \(was 0\), loss.beta=0.5 \(was 0.1\)\nnothing was changed"):
        run(*SHORT, "seed=3", "loss.beta=0.5", "lr=1e-5", f"resume={run_dir}")
    with pytest.raises(UserError, match=r"another config: loss.name=sft \(was tdpo\), loss.if_tdpo2=None \(was True\), "):
        run(*DATA, "n_epochs=null", "n_examples=32", f"resume={run_dir}")
    assert before == sorted(path for path in run_dir.rglob("*"))


def test_a_learning_rate_may_change(capsys, run_dir):
    run(*SHORT, "lr=1e-3", "n_examples=40", f"resume={run_dir}")
    assert "warning: lr changed from 0.0005 to 0.001" in capsys.readouterr().out
    assert logs_of(run_dir, "train")[-1]["lr"] == 1e-3


def test_other_data_are_refused(tmp_path):
    shutil.copytree(MINI / "data", tmp_path / "data")
    run_dir = run(*SHORT, f"datasets.hh.path={tmp_path}/data", f"local_run_dir={tmp_path}/run")
    other = [json.loads(line) for line in _read(tmp_path / "data" / "train.jsonl.gz")]
    other[5]["chosen"] += " and so on"
    _write(tmp_path / "data" / "train.jsonl.gz", other)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="the train data, or their tokens, are not those of"):
        run(*SHORT, f"datasets.hh.path={tmp_path}/data", f"resume={run_dir}")
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def _read(path: Path) -> list[str]:
    import gzip

    with gzip.open(path, "rt") as handle:
        return handle.readlines()


def _write(path: Path, rows: list[dict]) -> None:
    import gzip

    with gzip.open(path, "wt") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("n", [1, 2])
def test_a_resumed_run_keeps_its_first_reference(n, ranks, tmp_path):
    """LATEST in model.archive points elsewhere by now: the recorded file is used. Other weights, or a lost file, are refused."""
    archives = tmp_path / "sft"
    for step in ("step-1", "step-2"):
        (archives / step).mkdir(parents=True)
    content = torch.load(MINI / "sft_policy.pt", weights_only=True)
    torch.save(content, archives / "step-1" / "policy.pt")
    content["state"]["gpt_neox.final_layer_norm.bias"] += 0.1
    torch.save(content, archives / "step-2" / "policy.pt")
    (archives / "LATEST").symlink_to("step-1")
    make = ranks(n).run if n > 1 else run
    options = [*DATA, *(SHARDED if n > 1 else []), "loss=tdpo", f"model.archive={archives}/LATEST/policy.pt", "n_epochs=null"]
    straight = make(*options, "n_examples=32", f"local_run_dir={tmp_path}/straight")
    run_dir = make(*options, "n_examples=16", f"local_run_dir={tmp_path}/run")
    (archives / "LATEST").unlink()
    (archives / "LATEST").symlink_to("step-2")
    make(*options, "n_examples=32", f"resume={run_dir}")
    assert all(torch.equal(tensor, weights_of(straight)[name]) for name, tensor in weights_of(run_dir).items())
    other = [*options[:-2], f"model.archive={archives}/step-2/policy.pt", "n_epochs=null"]
    with pytest.raises(UserError, match="the reference's weights are not those"):
        make(*other, "n_examples=40", f"resume={run_dir}")
    shutil.rmtree(archives / "step-1")
    with pytest.raises(UserError, match="the reference's weights are not those"):
        make(*options, "n_examples=40", f"resume={run_dir}")


def test_resume_auto_may_start_a_new_run_and_must_may_not(tmp_path, capsys):
    here = f"local_run_dir={tmp_path}/run"
    with pytest.raises(UserError, match="resume=must: .*/run does not exist"):
        run(*SHORT, "resume=must", here)
    assert not (tmp_path / "run").exists()
    first = losses_of(run(*SHORT, "resume=auto", here, "n_examples=16"))
    for folder in (tmp_path / "run").glob("step-*"):
        (folder / "manifest.json").unlink()  # as if the run was killed before its first checkpoint was complete
    assert "starts from scratch" not in capsys.readouterr().out
    assert losses_of(run(*SHORT, "resume=auto", here, "n_examples=16")) == first
    assert "warning: no undamaged checkpoint in" in capsys.readouterr().out
    assert len((tmp_path / "run" / "metrics.jsonl.old").read_text().splitlines()) == len(first)
    run(*SHORT, "resume=must", here, "n_examples=24")
    with pytest.raises(UserError, match="already holds a run; choose another folder, or resume="):
        run(*SHORT, here)


def test_a_folder_in_use_by_another_run_is_refused(monkeypatch, run_dir):
    before = losses_of(run_dir)
    monkeypatch.setattr(resume, "LOCK_PATIENCE", 0.2)
    lock = resume.FolderLock(str(run_dir))
    with pytest.raises(UserError, match="another run writes into"):
        run(*SHORT, "n_examples=40", f"resume={run_dir}")
    lock.release()
    assert losses_of(run_dir) == before
    run(*SHORT, "n_examples=40", f"resume={run_dir}")
    assert len(logs_of(run_dir, "train")) == 5


def test_only_damaged_checkpoints_are_set_aside(run_dir):
    for name in ("step-32", "step-16"):
        damage_bytes(run_dir / name)
    run(*SHORT, f"resume={run_dir}")
    assert sorted(path.name for path in run_dir.glob("step-*")) == ["step-16", "step-24", "step-32", "step-32.old", "step-8"]


def test_what_another_run_did_before_the_lock_was_taken_counts(run_dir, tmp_path, monkeypatch):
    """A requeued job looks at the folder while its predecessor writes its last checkpoint."""
    straight = losses_of(run_dir)
    os.rename(run_dir / "step-32", tmp_path / "later")
    lock = resume.FolderLock.__init__

    def late(self, folder):
        lock(self, folder)
        if not (run_dir / "step-32").exists():
            os.rename(tmp_path / "later", run_dir / "step-32")

    monkeypatch.setattr(resume.FolderLock, "__init__", late)
    run(*SHORT, "resume=auto", f"local_run_dir={run_dir}")
    assert losses_of(run_dir) == straight and not list(run_dir.glob("*.old"))


def test_a_folder_that_another_run_filled_before_the_lock_was_taken_is_refused(made_once, tmp_path, monkeypatch):
    """Two starts without resume in the same second."""
    lock = resume.FolderLock.__init__
    monkeypatch.setattr(resume.FolderLock, "__init__", lambda self, folder: (copied(made_once, tmp_path / "run"), lock(self, folder))[1])
    with pytest.raises(UserError, match="already holds a run"):
        run(*SHORT, f"local_run_dir={tmp_path}/run")
    assert losses_of(tmp_path / "run") == losses_of(made_once)


def test_a_lock_on_a_folder_that_was_removed_meanwhile_is_none(tmp_path):
    first = resume.FolderLock(str(tmp_path / "a" / "b"))
    waiting = os.open(tmp_path / "a" / "b", os.O_RDONLY)  # another process has opened the folder, and waits for the lock
    first.release()  # removes the empty folders that it has created
    assert os.listdir(tmp_path) == []
    os.close(waiting)
    again = resume.FolderLock(str(tmp_path / "a" / "b"))
    assert os.path.samestat(os.fstat(again.handle), os.stat(tmp_path / "a" / "b"))
    again.release()


@pytest.mark.parametrize("field,value", [("examples", "8"), ("config", []), ("data", {}), ("reference", {}), ("hooks", None), ("ranks", 1)])
def test_a_progress_of_another_kind_is_damaged(field, value, run_dir, capsys):
    """Its hash is right: somebody wrote both."""
    path = run_dir / "step-32" / "state" / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    manifest = json.loads((run_dir / "step-32" / "manifest.json").read_text())
    manifest["files"]["state/progress.json"] = entry_of(str(path))
    (run_dir / "step-32" / "manifest.json").write_text(json.dumps(manifest))
    run(*SHORT, f"resume={run_dir}")
    assert "step-32 is damaged (state/progress.json): skipped" in capsys.readouterr().out


def test_a_log_that_others_have_written_to_is_cut_back_and_kept(run_dir, capsys):
    straight = losses_of(run_dir)
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\nnull\n{}\n")
    before = (run_dir / "metrics.jsonl").read_bytes()
    run(*SHORT, f"resume={run_dir}")
    assert losses_of(run_dir) == straight and (run_dir / "metrics.jsonl.old").read_bytes() == before
    assert "3 lines cannot be read; the file is kept as metrics.jsonl.old" in capsys.readouterr().out


def test_metrics_that_cannot_be_written_end_the_run_in_a_line(run_dir):
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").symlink_to("nowhere/metrics.jsonl")
    with pytest.raises((RunError, UserError), match="metrics.jsonl. cannot be|metrics.jsonl cannot be written") as error:
        run(*SHORT, "n_examples=40", f"resume={run_dir}")
    assert len(str(error.value).splitlines()) == 1


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_dir = run(*SHORT, "keep_checkpoints=2", f"local_run_dir={tmp_path}/run")
    assert sorted(path.name for path in run_dir.glob("step-*")) == ["step-24", "step-32"]


def test_unfinished_files_of_a_killed_run_are_removed(run_dir):
    straight = losses_of(run_dir)
    (run_dir / "step-40.tmp" / "state").mkdir(parents=True)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "counters/examples": 40, "loss/train": 0.1}\n{"split": "tra')
    run(*SHORT, f"resume={run_dir}")
    assert losses_of(run_dir) == straight and not (run_dir / "step-40.tmp").exists()


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **arguments: seen.append(arguments) or init(**arguments))
    run_dir = run(*DATA, "n_examples=16", "wandb.enabled=true", f"local_run_dir={tmp_path}/run")
    run(*DATA, "n_examples=24", "wandb.enabled=true", f"resume={run_dir}")
    assert "id" not in seen[0] and seen[1]["resume"] == "allow"
    assert all(seen[1]["id"] in name for name in os.listdir(run_dir / "wandb") if name.startswith("offline-run"))


def test_keys_that_make_another_run():
    objective = get_objective("dpo", beta=0.1)
    saved = {
        "seed": 0,
        "lr": 1.0,
        "model": {"archive": "a", "name_or_path": "x"},
        "datasets": {"hh": {"path": "p", "invalid_rows": "keep"}},
    }
    now = {"seed": 1, "lr": 2.0, "model": {"archive": "b", "name_or_path": "y"}, "datasets": {"hh": {"path": "q", "invalid_rows": "skip"}}}
    assert set(resume.differing_keys(saved, now, objective)) == {"seed", "lr", "model.name_or_path", "datasets.hh.invalid_rows"}
    assert resume.differing_keys(saved, saved, objective) == {}


def test_a_config_saved_before_a_key_existed_has_its_default():
    """But a dataset that the saved run did not have is another run, even if all its keys have their defaults."""
    current = OmegaConf.to_container(compose("exp_name=x", "datasets=[hh,shp]"))
    objective = get_objective("sft")
    older = copy.deepcopy(current)
    del older["dry_run"], older["model"]["chat_template"], older["datasets"]["hh"]["escape_special_tokens"]
    assert resume.differing_keys(older, current, objective) == {}
    assert resume.differing_keys(older, {**current, "lr": 1.0}, objective) == {"lr": (older["lr"], 1.0)}
    given = {**current, "model": {**current["model"], "chat_template": "t"}}
    assert resume.differing_keys(older, given, objective) == {"model.chat_template": (None, "t")}
    del older["datasets"]["shp"]
    assert "datasets.shp.loader" in resume.differing_keys(older, current, objective)
