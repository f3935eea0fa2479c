"""tdpo/training/saver.py: weights that are not finite are never published, and sound checkpoints stay until newer ones are proven."""

import math
import os
import shutil

import pytest
import torch
from helpers import DATA, PREFERENCE, SHARDED, TENSOR, assert_same_run, assert_same_weights, logs_of, run, weights_of

from tdpo.utils import RunError
from trainers import BasicTrainer

SHORT = [*PREFERENCE, "n_epochs=null", "n_examples=48", "save_every=8", "eval_every=16", "n_eval_examples=8"]


def steps(run_dir) -> list[str]:
    return sorted(path.name for path in run_dir.glob("step-*"))


def ruin(monkeypatch, at: int, value: float) -> None:
    """Set a weight after the step that ends with `at` examples, as a step with finite loss and gradient but a huge lr does."""
    advance = BasicTrainer.train_step

    def step(self, examples, microbatches):
        sums = advance(self, examples, microbatches)
        if self.progress.examples == at:
            with torch.no_grad():
                self.policy.get_output_embeddings().weight[..., -1] = value
        return sums

    monkeypatch.setattr(BasicTrainer, "train_step", step)


@pytest.mark.parametrize("at,value", [(16, math.nan), (24, math.inf), (48, math.nan)], ids=["before an eval", "between evals", "last step"])
def test_ruined_weights_are_not_published(at, value, tmp_path, monkeypatch):
    options = [*SHORT, "keep_checkpoints=1", f"local_run_dir={tmp_path}/run"]
    with (
        monkeypatch.context() as patched,
        pytest.raises(RunError, match="weights or optimizer state are not finite .*: not saved; the last checkpoint is"),
    ):
        ruin(patched, at, value)
        run(*options)
    assert os.readlink(tmp_path / "run" / "LATEST") == f"step-{at - 8}" and f"step-{at}" not in steps(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run").values())
    straight = run(*SHORT, f"local_run_dir={tmp_path}/straight")
    assert_same_run(run(*options, "resume=must"), straight)


def test_a_ruined_optimizer_state_is_not_published(tmp_path, monkeypatch):
    """The weights are finite until the next step."""
    step = BasicTrainer.train_step

    def ruining(self, examples, microbatches):
        sums = step(self, examples, microbatches)
        next(iter(self.optimizer.state.values()))["square_avg"].fill_(math.nan)
        return sums

    monkeypatch.setattr(BasicTrainer, "train_step", ruining)
    with pytest.raises(RunError, match="optimizer state are not finite .*square_avg"):
        run(*SHORT, f"local_run_dir={tmp_path}/run")
    assert steps(tmp_path / "run") == []


def test_a_learning_rate_that_overflows_ends_the_run_before_the_first_checkpoint(tmp_path):
    with pytest.raises(RunError, match="weights or optimizer state are not finite .*there is no checkpoint\ntry a smaller lr"):
        run(*SHORT, "lr=1e38", "warmup_steps=0", "n_examples=8", f"local_run_dir={tmp_path}/run")
    assert steps(tmp_path / "run") == []


@pytest.mark.parametrize("trainer", [SHARDED, TENSOR], ids=["FSDP", "tensor parallel"])
def test_ruined_weights_of_any_rank_are_not_published(trainer, ranks, tmp_path):
    options = [*SHORT, *trainer, "lr=1e38", "warmup_steps=0", "n_examples=8"]
    with pytest.raises(RunError, match="weights or optimizer state are not finite"):
        ranks(2).run(*options, f"local_run_dir={tmp_path}/run")
    assert steps(tmp_path / "run") == []


@pytest.mark.parametrize("keep,expected", [(1, ["step-16", "step-24"]), (3, ["step-16", "step-24", "step-8"])])
def test_a_checkpoint_with_finite_but_useless_weights_does_not_cost_the_one_before(keep, expected, tmp_path, monkeypatch):
    """The loss is not finite in the next step, so no finite step has followed it."""
    with pytest.raises(RunError, match="the loss is not finite") as error:
        ruin(monkeypatch, 24, 3e38)
        run(*SHORT, f"keep_checkpoints={keep}", f"local_run_dir={tmp_path}/run")
    assert steps(tmp_path / "run") == expected
    run_dir = tmp_path / "run"
    assert f"no finite step has followed {run_dir}/step-24: " in str(error.value) and f"resume from {run_dir}/step-16" in str(error.value)
    monkeypatch.undo()
    with pytest.raises(RunError, match="no finite step has followed"):
        run(*SHORT, f"keep_checkpoints={keep}", f"resume={run_dir}")
    shutil.rmtree(run_dir / "step-24")  # as the error advises
    assert_same_run(run(*SHORT, f"keep_checkpoints={keep}", f"resume={run_dir}"), run(*SHORT, f"local_run_dir={tmp_path}/straight"))


def test_a_last_eval_that_is_not_finite_ends_with_an_error(tmp_path, monkeypatch, capsys):
    with pytest.raises(
        RunError, match="the last eval is not finite .*: do not use .*/step-48; before it, finite steps followed .*/step-40"
    ):
        ruin(monkeypatch, 48, 3e38)
        run(*SHORT, "keep_checkpoints=1", f"local_run_dir={tmp_path}/run")
    assert steps(tmp_path / "run") == ["step-40", "step-48"]
    assert "warning: the eval is not finite: loss/eval" in capsys.readouterr().out


def test_checkpoints_that_a_finite_step_has_followed_are_removed(tmp_path):
    assert steps(run(*SHORT, "keep_checkpoints=1", f"local_run_dir={tmp_path}/run")) == ["step-48"]


@pytest.mark.parametrize("policy,with_file", [("always", [8, 16, 24]), ("final", [24]), ("never", [])])
def test_save_policy(policy, with_file, tmp_path):
    options = [*SHORT, "n_examples=24", f"save_policy={policy}", f"local_run_dir={tmp_path}/run"]
    run_dir = run(*options)
    assert [n for n in (8, 16, 24) if (run_dir / f"step-{n}" / "policy.pt").exists()] == with_file
    assert (run_dir / "LATEST" / "hf" / "model.safetensors").exists()
    straight = run(*SHORT, "n_examples=32", f"local_run_dir={tmp_path}/straight")
    run(*SHORT, "n_examples=32", "save_policy=always", f"resume={run_dir}")  # another value may be given when resuming
    assert_same_weights(run_dir, straight)


def test_a_finished_run_gets_the_policy_file_that_it_lacks(tmp_path):
    """As after a stop signal during the last eval: the last step's checkpoint exists, but is not the final one."""
    run_dir = run(*SHORT, "n_examples=24", "save_policy=never", f"local_run_dir={tmp_path}/run")
    shutil.rmtree(run_dir / "step-24" / "hf")
    for _ in range(2):
        run(*SHORT, "n_examples=24", "save_policy=final", f"resume={run_dir}")
        assert (run_dir / "LATEST" / "hf" / "config.json").exists()
    straight = run(*SHORT, "n_examples=24", f"local_run_dir={tmp_path}/straight")
    assert_same_run(run_dir, straight)
    os.rename(run_dir / "step-24" / "policy.pt", run_dir / "step-24" / "policy.pt.tmp")  # as if killed between two renames
    run(*SHORT, "n_examples=24", f"resume={run_dir}")
    assert_same_run(run_dir, straight)


def test_an_sft_run_without_policy_files_is_an_archive(tmp_path):
    """The preference run starts from the same weights, and finds them again after the SFT run went on."""
    sft = [*DATA, "loss=sft", "n_epochs=null", "save_every=8", "eval_every=16", "n_eval_examples=8"]
    tdpo = [*DATA, "loss=tdpo", "n_epochs=null", "n_eval_examples=8"]
    with_file = run(*sft, "n_examples=16", f"local_run_dir={tmp_path}/with")
    without = run(*sft, "n_examples=16", "save_policy=never", f"local_run_dir={tmp_path}/without")
    straight = run(*tdpo, "n_examples=24", f"model.archive={with_file}/LATEST/policy.pt", f"local_run_dir={tmp_path}/straight")
    ours = run(*tdpo, "n_examples=16", f"model.archive={without}", f"local_run_dir={tmp_path}/ours")
    run(*sft, "n_examples=24", "save_policy=never", f"resume={without}")
    run(*tdpo, "n_examples=24", f"model.archive={without}", f"resume={ours}")
    assert [log["loss/train"] for log in logs_of(ours, "train")] == [log["loss/train"] for log in logs_of(straight, "train")]
    assert all(torch.equal(tensor, weights_of(straight)[name]) for name, tensor in weights_of(ours).items())
