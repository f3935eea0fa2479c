"""Resume a run where it stopped: in which folder, from which checkpoint, whether it is the same run, and its logs cut back to there."""

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

# Keys that may differ from the run that is resumed: where and how it computes, how long, how often it saves. What stands for a file's
# content (model.archive, datasets.*.path) is compared by that content.
MAY_CHANGE = (
    "exp_name debug fsdp_port wandb local_dirs local_run_dir resume keep_checkpoints trainer nproc_per_node parallel "
    "gradient_accumulation_steps tokens_per_microbatch scoring compile reference_cache eval_batch_size activation_checkpointing "
    "deterministic n_epochs n_examples save_every max_skipped_steps minimum_log_interval_secs "
    "model.archive model.block_name model.attn_implementation"
).split()
# These change what comes, not what was: a warning, not an error.
MAY_CHANGE_WITH_WARNING = (
    "lr warmup_steps max_grad_norm eval_every n_eval_examples n_eval_model_samples sample_during_eval do_first_eval"
).split()


LOCK_PATIENCE = 30.0  # seconds


class Resumed(NamedTuple):
    """A sound checkpoint of the run that is resumed."""

    folder: str
    progress: Progress


def choose_run_dir(config: DictConfig) -> str:
    """The run's folder, which may not exist yet.

    Raises:
        UserError: it holds a run, and `resume` does not say to go on; or it should hold one, and does not.
    """
    resume, run_dir = config.resume, config.local_run_dir
    if resume in ("auto", "must"):
        if run_dir is None:
            raise UserError(f"resume={resume} needs local_run_dir, so that the same command finds the same folder again")
    elif resume is not None:
        if run_dir is not None and os.path.realpath(run_dir) != os.path.realpath(resume):
            raise UserError(f"resume={resume} goes on in that folder; leave local_run_dir={run_dir} out")
        run_dir = resume
    elif run_dir is None:
        return get_local_run_dir(config.exp_name, config.local_dirs)
    elif holds_a_run(run_dir):
        raise UserError(
            f"local_run_dir={run_dir} already holds a run; choose another folder, or resume={run_dir} to go on; nothing was changed"
        )
    latest = os.path.join(run_dir, "LATEST")
    if os.path.isdir(latest) and not os.path.islink(latest):
        raise UserError(f"{latest} is a folder, of a run of the published code, which cannot be resumed; choose another local_run_dir")
    if resume not in (None, "auto") and not list_checkpoints(run_dir):
        parent, name = os.path.split(os.path.normpath(run_dir))
        hint = f" (did you mean resume={parent}?)" if name == "LATEST" or name.startswith("step-") else ""
        what = "holds no checkpoint to resume from" if os.path.isdir(run_dir) else "does not exist"
        raise UserError(f"resume={resume}: {run_dir} {what}{hint}")
    return run_dir


def find_checkpoint(world: World, config: DictConfig, objective: Objective) -> Optional[Resumed]:
    """Return the newest sound checkpoint of the run's folder; None where the run starts. Called by all ranks; changes nothing.

    Raises:
        UserError: none is sound and `resume` asks for one, or it is another run's.
    """
    if config.resume is None:
        return None
    run_dir, folders = world.from_first(lambda: (found := choose_run_dir(config), list_checkpoints(found)))
    for folder in folders:
        if damaged := damaged_files(world, folder):
            log.warning(f"{folder} is damaged ({some_of(damaged, 4)}): it is passed over")
            continue
        return world.from_first(lambda folder=folder: _same_run(Resumed(folder, read_progress(folder)), config, objective))
    return world.from_first(lambda: _nothing_sound(config.resume, run_dir))


def _nothing_sound(resume: str, run_dir: str) -> None:
    if resume != "auto":
        raise UserError(f"resume={resume}: no checkpoint in {run_dir} is sound")
    if holds_a_run(run_dir):
        log.warning(f"no sound checkpoint in {run_dir}: the run starts anew, what was there gets the ending .old")


def _same_run(resumed: Resumed, config: DictConfig, objective: Objective) -> Resumed:
    """Return the checkpoint, or raise UserError if its run has another config."""
    different = differing_keys(resumed.progress.config, OmegaConf.to_container(config), objective)
    refused = {key: values for key, values in different.items() if key not in MAY_CHANGE_WITH_WARNING}
    if refused:
        told = some_of([f"{key}={now} (was {was})" for key, (was, now) in refused.items()], 8)
        raise UserError(
            f"{os.path.dirname(resumed.folder)} is a run of another config: {told}\n"
            "nothing was changed; repeat the options of its command, or choose another folder"
        )
    for key, (was, now) in different.items():
        log.warning(f"{key}={now}, until now {was}")
    return resumed


def differing_keys(saved: Mapping, current: Mapping, objective: Objective) -> dict[str, tuple[Any, Any]]:
    """Return the keys that make this another run, or another continuation: (saved, current) values, None for a missing one."""
    keys = dict.fromkeys([*flat_keys(saved), *flat_keys(current)])
    # How often each stage's part of the data is given decides what comes after it.
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
    """Compare fingerprints of the data and of the reference's weights with the saved run's.

    Raises:
        UserError: train data or reference are others. Other eval data are said.
    """
    saved = resumed.progress
    if saved.data["train"] != data["train"]:
        raise UserError(f"the train data, or their tokens, are not those of {os.path.dirname(resumed.folder)}: it cannot go on with them")
    if saved.data["eval"] != data["eval"]:
        log.warning("the eval data are not those that the run had until now")
    if saved.reference["fingerprint"] != reference:
        raise UserError(
            f"the reference's weights are not those of {os.path.dirname(resumed.folder)}: "
            f"give the archive that it started with (then {saved.reference['archive']})"
        )


def archive_of(resumed: Optional[Resumed], given: Optional[str]) -> Optional[str]:
    """Resolve model.archive. When a run is resumed with the same value, the path recorded at its start is used: LATEST may point elsewhere
    by now. Another value means what it says; check_same_data compares the weights."""
    if resumed is not None and given == resumed.progress.config["model"]["archive"]:
        saved = resumed.progress.reference["archive"]
        return saved if saved is not None and os.path.exists(saved) else given
    return given


def check_seen_by_all(world: World, run_dir: str) -> None:
    """Raises UserError where a rank does not see what rank 0 has written into the run's folder."""
    path, end = os.path.join(run_dir, "config.yaml"), time.monotonic() + 30
    with world.agreed():
        while not os.path.exists(path):  # a network disk may take its time
            if time.monotonic() > end:
                raise UserError(f"{run_dir} is not the same folder for all ranks (not for rank {world.rank}): it must be on a common disk")
            time.sleep(0.5)


class RunFolder:
    """A run's folder while this run writes into it: made, or what a run left in it made ready to continue, and other runs kept out.

    A context manager; called by all ranks. If a UserError leaves it before anything was logged or saved, its config.yaml goes again, since
    the corrected command starts anew.

    Args:
        world: the run's processes.
        run_dir: path.
        config: to be kept there.
        resumed: the checkpoint to continue from; None where the run starts.

    Raises:
        UserError: it cannot be written, another run is in it, or a rank does not see it.
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
    """Keeps other runs out of a folder until it is released, or this process ends: a job that is requeued may overlap with the one before.

    Raises:
        UserError: another run is in it, and does not end within LOCK_PATIENCE.
    """

    def __init__(self, run_dir: str):
        self.handle, end = os.open(run_dir, os.O_RDONLY), time.monotonic() + LOCK_PATIENCE
        while not try_lock(self.handle):
            if time.monotonic() > end:
                self.release()
                raise UserError(f"another run trains into {run_dir}: wait for it, or choose another folder")
            time.sleep(0.5)

    def release(self) -> None:
        os.close(self.handle)


def prepare_run_dir(run_dir: str, resumed: Optional[Resumed]) -> None:
    """Make the folder fit to go on in: logs end where the checkpoint does, and what a dying run left half done is out of the way."""
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
        set_aside(folder)  # newer, and damaged
    point_latest(run_dir, os.path.basename(resumed.folder))
    for name in LOGS:
        _cut_back(os.path.join(run_dir, name), resumed.progress)


def _cut_back(path: str, progress: Progress) -> None:
    """Leave out the log lines of steps and evals that will be done again, and one that a dying run left unfinished."""
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
