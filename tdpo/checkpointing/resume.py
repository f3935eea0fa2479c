"""Resuming a run: choose its folder and checkpoint, check that it is the same run, and cut its logs back to the checkpoint."""

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from omegaconf import DictConfig, OmegaConf

from tdpo.checkpointing.checkpoints import damaged_files, holds_a_run, list_checkpoints, point_latest, set_aside
from tdpo.checkpointing.training_state import Progress, read_progress
from tdpo.distributed.world import World
from tdpo.losses import Objective
from tdpo.utils import UserError, flat_keys, get_local_run_dir, get_logger, some_of, try_lock

log = get_logger(__name__)

LOGS = ("metrics.jsonl", "samples.jsonl")

# Keys that may differ from those of the resumed run: where and how it computes, for how long, how often it saves. Paths (model.archive,
# datasets.*.path) may differ too, because the files' contents are compared.
MAY_CHANGE = (
    "exp_name debug fsdp_port wandb local_dirs local_run_dir resume keep_checkpoints trainer nproc_per_node parallel "
    "gradient_accumulation_steps tokens_per_microbatch scoring compile reference_cache eval_batch_size activation_checkpointing "
    "deterministic n_epochs n_examples save_every max_skipped_steps minimum_log_interval_secs "
    "model.archive model.block_name model.attn_implementation"
).split()
# Keys that change the rest of the run: a difference is a warning, not an error.
MAY_CHANGE_WITH_WARNING = (
    "lr warmup_steps max_grad_norm eval_every n_eval_examples n_eval_model_samples sample_during_eval do_first_eval"
).split()


LOCK_PATIENCE = 30.0  # seconds to wait for another run to leave the folder


class Resumed(NamedTuple):
    """An undamaged checkpoint, from which a run is resumed."""

    folder: str
    progress: Progress


def choose_run_dir(config: DictConfig) -> str:
    """Return the path of the run's folder, which may not exist yet.

    Raises:
        UserError: the folder holds a run but `resume` is null, it lacks a checkpoint that `resume` needs, or keys contradict each other.
    """
    resume, run_dir = config.resume, config.local_run_dir
    if resume in ("auto", "must"):
        if run_dir is None:
            raise UserError(f"resume={resume} needs local_run_dir: with it the same command finds the same folder again")
    elif resume is not None:
        if run_dir is not None and os.path.realpath(run_dir) != os.path.realpath(resume):
            raise UserError(f"resume={resume} names the run's folder, local_run_dir={run_dir} another one: leave local_run_dir out")
        run_dir = resume
    elif run_dir is None:
        return get_local_run_dir(config.exp_name, config.local_dirs)
    elif holds_a_run(run_dir):
        raise UserError(
            f"local_run_dir={run_dir} already holds a run; choose another folder, or resume={run_dir} to continue it; nothing was changed"
        )
    latest = os.path.join(run_dir, "LATEST")
    if os.path.isdir(latest) and not os.path.islink(latest):
        raise UserError(f"{latest} is a folder, written by the published code, whose runs cannot be resumed: use another local_run_dir")
    if resume not in (None, "auto") and not list_checkpoints(run_dir):
        parent, name = os.path.split(os.path.normpath(run_dir))
        hint = f" (did you mean resume={parent}?)" if name == "LATEST" or name.startswith("step-") else ""
        what = "holds no checkpoint to resume from" if os.path.isdir(run_dir) else "does not exist"
        raise UserError(f"resume={resume}: {run_dir} {what}{hint}")
    return run_dir


def find_checkpoint(world: World, config: DictConfig, objective: Objective) -> Optional[Resumed]:
    """Return the newest undamaged checkpoint in the run's folder; None for a new run. Called on all ranks; changes nothing on disk.

    Raises:
        UserError: all checkpoints are damaged and `resume` is not auto, or the checkpoint is from a run with another config.
    """
    if config.resume is None:
        return None
    run_dir, folders = world.from_first(lambda: (found := choose_run_dir(config), list_checkpoints(found)))
    for folder in folders:
        if damaged := damaged_files(world, folder):
            log.warning(f"{folder} is damaged ({some_of(damaged, 4)}): skipped")
            continue
        return world.from_first(lambda folder=folder: _same_run(Resumed(folder, read_progress(folder)), config, objective))
    return world.from_first(lambda: _nothing_sound(config.resume, run_dir))


def _nothing_sound(resume: str, run_dir: str) -> None:
    """Warn that the run starts from scratch; raise UserError unless resume=auto."""
    if resume != "auto":
        raise UserError(f"resume={resume}: all checkpoints in {run_dir} are damaged; start a new run in another local_run_dir")
    if holds_a_run(run_dir):
        log.warning(f"no undamaged checkpoint in {run_dir}: the run starts from scratch, old logs and checkpoints get the ending .old")


def _same_run(resumed: Resumed, config: DictConfig, objective: Objective) -> Resumed:
    """Return the checkpoint; raise UserError if its run has another config."""
    different = differing_keys(resumed.progress.config, OmegaConf.to_container(config), objective)
    refused = {key: values for key, values in different.items() if key not in MAY_CHANGE_WITH_WARNING}
    if refused:
        told = some_of([f"{key}={now} (was {was})" for key, (was, now) in refused.items()], 8)
        raise UserError(
            f"{os.path.dirname(resumed.folder)} is a run with another config: {told}\n"
            "nothing was changed; repeat the options of that run, or choose another folder"
        )
    for key, (was, now) in different.items():
        log.warning(f"{key} changed from {was} to {now}")
    return resumed


def differing_keys(saved: Mapping, current: Mapping, objective: Objective) -> dict[str, tuple[Any, Any]]:
    """Return the keys that make this another run or change its continuation: {key: (saved, current)}, with None for a missing value."""
    keys = dict.fromkeys([*flat_keys(saved), *flat_keys(current)])
    # With stages, n_epochs determines when each stage begins.
    free = set(MAY_CHANGE) - ({"n_epochs"} if objective.stages > 1 else set())
    different = {}
    for key in keys:
        parts = key.split(".")
        if any(".".join(parts[: i + 1]) in free for i in range(len(parts))) or (parts[0] == "datasets" and parts[-1].endswith("path")):
            continue
        was, now = _value(saved, parts), _value(current, parts)
        if was != now:
            different[key] = (was, now)
    return different


def _value(values: Any, parts: list[str]) -> Any:
    for part in parts:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def check_same_data(resumed: Resumed, data: Mapping[str, str], reference: str) -> None:
    """Compare the data and the reference's weights with those of the saved run. Other eval data only log a warning.

    Args:
        resumed: the checkpoint.
        data: fingerprint of each split (train, eval).
        reference: fingerprint of the reference's weights; '' without a reference.

    Raises:
        UserError: the train data or the reference differ.
    """
    saved = resumed.progress
    if saved.data["train"] != data["train"]:
        raise UserError(f"the train data, or their tokens, are not those of {os.path.dirname(resumed.folder)}: use the same data")
    if saved.data["eval"] != data["eval"]:
        log.warning("the eval data are not those that the run used before")
    if saved.reference["fingerprint"] != reference:
        raise UserError(
            f"the reference's weights are not those of {os.path.dirname(resumed.folder)}: "
            f"set model.archive to the weights that the run started from (then in {saved.reference['archive']})"
        )


def archive_of(resumed: Optional[Resumed], given: Optional[str]) -> Optional[str]:
    """Resolve model.archive.

    If a run is resumed with the same value, the path that was recorded at its start is used if it still exists, because LATEST may point
    elsewhere by now. Another value is used as it is; check_same_data compares the weights.
    """
    if resumed is not None and given == resumed.progress.config["model"]["archive"]:
        saved = resumed.progress.reference["archive"]
        return saved if saved is not None and os.path.exists(saved) else given
    return given


def check_seen_by_all(world: World, run_dir: str) -> None:
    """Raise UserError if a rank does not see what rank 0 has written into the run's folder. Called on all ranks; waits up to 30 s."""
    path, end = os.path.join(run_dir, "config.yaml"), time.monotonic() + 30
    with world.agreed():
        while not os.path.exists(path):  # a network disk may take its time
            if time.monotonic() > end:
                raise UserError(f"{run_dir} is not the same folder for all ranks (not for rank {world.rank}): use a disk that they share")
            time.sleep(0.5)


class RunFolder:
    """A context manager for a run's folder, entered on all ranks: creates the folder or prepares it for resuming, and locks out other runs.

    If the block raises a UserError before anything was logged or saved, config.yaml is removed, so that the corrected command can start a
    new run in the folder.

    Args:
        world: the run's ranks.
        run_dir: path of the folder.
        config: is written into the folder.
        resumed: the checkpoint to resume from; None for a new run.

    Raises:
        UserError: the folder cannot be written, another run writes into it, or a rank does not see it.
    """

    def __init__(self, world: World, run_dir: str, config: DictConfig, resumed: Optional[Resumed]):
        self.world, self.run_dir, self.config, self.resumed = world, run_dir, config, resumed
        self.lock: Optional[FolderLock] = None

    def __enter__(self) -> "RunFolder":
        with self.world.agreed():
            try:
                if self.world.is_first:
                    os.makedirs(self.run_dir, exist_ok=True)
                    self.lock = FolderLock(self.run_dir)
                    prepare_run_dir(self.run_dir, self.resumed)
                    OmegaConf.save(self.config, os.path.join(self.run_dir, "config.yaml"))
            except OSError as error:
                raise UserError(f"local_run_dir={self.run_dir} cannot be written: {error}") from None
        check_seen_by_all(self.world, self.run_dir)
        log.info("=" * 80 + f"\nWriting to {socket.gethostname()}:{self.run_dir}\n" + "=" * 80)
        return self

    def __exit__(self, kind: Optional[type], *_: object) -> None:
        if self.lock is None:
            return
        if kind is not None and issubclass(kind, UserError) and not {"metrics.jsonl", "LATEST"} & set(os.listdir(self.run_dir)):
            os.remove(os.path.join(self.run_dir, "config.yaml"))
        self.lock.release()


class FolderLock:
    """A lock that keeps other runs out of a folder until it is released or this process ends.

    It is waited for, because a requeued job may overlap with its predecessor.

    Raises:
        UserError: another run still has the lock after LOCK_PATIENCE seconds.
    """

    def __init__(self, run_dir: str):
        self.handle, end = os.open(run_dir, os.O_RDONLY), time.monotonic() + LOCK_PATIENCE
        while not try_lock(self.handle):
            if time.monotonic() > end:
                self.release()
                raise UserError(f"another run writes into {run_dir}: wait until it has ended, or choose another folder")
            time.sleep(0.5)

    def release(self) -> None:
        os.close(self.handle)


def prepare_run_dir(run_dir: str, resumed: Optional[Resumed]) -> None:
    """Prepare a run's folder for writing.

    Unfinished checkpoints are removed. For a new run, old logs and checkpoints are renamed to <name>.old. For a resumed one, logs are cut
    back to its checkpoint, newer checkpoints (which are damaged) are renamed, and LATEST points to its checkpoint.
    """
    for name in os.listdir(run_dir):
        if name.startswith("step-") and name.endswith(".tmp"):
            shutil.rmtree(os.path.join(run_dir, name), ignore_errors=True)
    if resumed is None:
        for name in LOGS:
            set_aside(os.path.join(run_dir, name))
        for folder in list_checkpoints(run_dir):
            set_aside(folder)
        return
    for folder in list_checkpoints(run_dir):
        if os.path.basename(folder) == os.path.basename(resumed.folder):
            break
        set_aside(folder)  # newer, but damaged
    point_latest(run_dir, os.path.basename(resumed.folder))
    for name in LOGS:
        _cut_back(os.path.join(run_dir, name), resumed.progress)


def _cut_back(path: str, progress: Progress) -> None:
    """Remove the log lines of steps and evals that will be repeated, and a line that was not written to its end."""
    if not os.path.exists(path):
        return
    evaluated = progress.evaluated_at == progress.examples
    kept = []
    with open(path) as handle:
        for line in handle:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            of_eval = entry.get("split") != "train"
            if entry["counters/examples"] < progress.examples + (evaluated or not of_eval):
                kept.append(line)
    with open(path + ".tmp", "w") as handle:
        handle.writelines(kept)
    os.replace(path + ".tmp", path)
