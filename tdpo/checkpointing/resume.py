"""Resuming a run: choose its folder and checkpoint, check that it is the same run, and cut its logs back to the checkpoint."""

import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Optional

from omegaconf import DictConfig, OmegaConf

from tdpo.checkpointing.checkpoints import (
    ADAPTER,
    BEST,
    LATEST,
    checkpoint_of,
    damaged_files,
    has_no_policy,
    holds_a_run,
    list_checkpoints,
    point,
)
from tdpo.checkpointing.logs import LOGS, cut_back
from tdpo.checkpointing.training_state import Progress, read_progress
from tdpo.distributed.world import World
from tdpo.files import reason_of, remove, replaced_whole, set_aside
from tdpo.losses import Objective
from tdpo.optimizers import own_weight_decay
from tdpo.utils import CONFIG_DIR, UserError, flat_keys, get_local_run_dir, get_logger, some_of, try_lock

log = get_logger(__name__)

# Keys that may differ from those of the resumed run: where and how it computes, for how long, how often it saves. Paths (model.archive,
# datasets.*.path) may differ too, because the files' contents are compared.
MAY_CHANGE = (
    "exp_name debug dry_run fsdp_port wandb local_dirs local_run_dir resume keep_checkpoints save_policy trainer nproc_per_node parallel "
    "gradient_accumulation_steps tokens_per_microbatch scoring compile reference_cache eval_batch_size activation_checkpointing "
    "deterministic n_epochs n_examples keep_best stop_when console sinks save_every max_skipped_steps minimum_log_interval_secs "
    "model.archive model.block_name model.attn_implementation"
).split()
# Keys that change the rest of the run: a difference is a warning, not an error.
MAY_CHANGE_WITH_WARNING = (
    "lr lr_schedule min_lr decay_steps warmup_steps max_grad_norm eval_every n_eval_examples n_eval_model_samples sample_during_eval "
    "do_first_eval"
).split()


CONFIG = "config.yaml"
TEMPLATE = "chat_template.jinja"
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
    check_run_dir(config, run_dir)
    return run_dir


def check_run_dir(config: DictConfig, run_dir: str) -> None:
    """Check that the run may use a folder, as it is now.

    Raises:
        UserError: it holds a run but `resume` is null, or it lacks a checkpoint that `resume` needs.
    """
    resume = config.resume
    if resume is None and holds_a_run(run_dir):
        raise UserError(
            f"local_run_dir={run_dir} already holds a run; choose another folder, or resume={run_dir} to continue it; nothing was changed"
        )
    latest = os.path.join(run_dir, LATEST)
    if os.path.isdir(latest) and not os.path.islink(latest):
        raise UserError(f"{latest} is a folder, written by the published code, whose runs cannot be resumed: use another local_run_dir")
    if resume not in (None, "auto") and not list_checkpoints(run_dir):
        parent, name = os.path.split(os.path.normpath(run_dir))
        hint = f" (did you mean resume={parent}?)" if name in (LATEST, BEST) or name.startswith("step-") else ""
        what = "holds no checkpoint to resume from" if os.path.isdir(run_dir) else "does not exist"
        raise UserError(f"resume={resume}: {run_dir} {what}{hint}")


def _find_checkpoint(world: World, run_dir: str, config: DictConfig, objective: Objective) -> tuple[Optional[Resumed], list[str]]:
    """Return the newest undamaged checkpoint in the run's folder (None for a new run), and the damaged ones that are newer."""
    damaged: list[str] = []
    if config.resume is None:
        return None, damaged
    for folder in world.from_first(lambda: list_checkpoints(run_dir, tell=True)):
        wrong = damaged_files(world, folder)
        resumed = None if wrong else world.from_first(lambda folder=folder: _read(folder))
        if resumed is not None:
            return world.from_first(lambda resumed=resumed: _same_run(resumed, config, objective)), damaged
        log.warning(f"{folder} is damaged ({some_of(wrong, 4) or 'state/progress.json'}): skipped")
        damaged.append(folder)
    world.from_first(lambda: _nothing_sound(config.resume, run_dir))
    return None, damaged


def _read(folder: str) -> Optional[Resumed]:
    """Return the checkpoint; None if its progress.json, whose hash is right, has another content than this program writes."""
    try:
        return Resumed(folder, read_progress(folder))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


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
    saved = _with_own_decay(saved)
    known = set(flat_keys(saved))
    keys = dict.fromkeys([*flat_keys(saved), *flat_keys(current)])
    # With stages, n_epochs determines when each stage begins.
    free = set(MAY_CHANGE) - ({"n_epochs"} if objective.stages > 1 else set())
    different = {}
    for key in keys:
        parts = key.split(".")
        if any(".".join(parts[: i + 1]) in free for i in range(len(parts))) or (parts[0] == "datasets" and parts[-1].endswith("path")):
            continue
        was = _value(saved, parts) if key in known else _default(parts, saved)
        now = _value(current, parts)
        if was != now:
            different[key] = (was, now)
    return different


def _with_own_decay(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a saved config with the weight decay that earlier versions, which had no optimizer_options, left to the optimizer."""
    if "optimizer_options" in saved or "optimizer" not in saved or not (decay := own_weight_decay(saved["optimizer"])):
        return saved
    return {**saved, "optimizer_options": {"weight_decay": decay}}


def _default(parts: list[str], saved: Mapping[str, Any]) -> Any:
    """Return the default of a key that a saved config lacks, because it was saved before the key existed; None if it has no default, or
    belongs to a dataset that the saved run did not have."""
    files = {
        "model": "model/blank_model.yaml",
        "datasets": f"datasets/{parts[1] if len(parts) > 1 else ''}.yaml",
        "loss": f"loss/{_value(saved, ['loss', 'name'])}.yaml",
    }
    path = os.path.join(CONFIG_DIR, files.get(parts[0], "config.yaml"))
    if not os.path.isfile(path):
        return None
    depth = {"model": 1, "datasets": 2, "loss": 1}.get(parts[0], 0)
    if _value(saved, parts[:depth]) is None:
        return None
    return _value(OmegaConf.to_container(OmegaConf.load(path)), parts[depth:])


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
        what = "reference's weights" if _value(saved.config, ["adapter", "rank"]) is None else "weights below the adapters"
        raise UserError(
            f"the {what} are not those of {os.path.dirname(resumed.folder)}: "
            f"set model.archive to the weights that the run started from (then in {saved.reference['archive']})"
        )


def own_command() -> str:
    """Return the command line of this process if it is train.py; else ''."""
    return shlex.join(["python", "-u", "train.py", *sys.argv[1:]]) if os.path.basename(sys.argv[0]) == "train.py" else ""


def command_of(run_dir: str) -> str:
    """Return the command with which a run was started, which is the comment at the top of its config.yaml; '' if there is none."""
    try:
        with open(os.path.join(run_dir, CONFIG), encoding="utf-8", errors="replace") as file:
            line = file.readline(2**16)
    except OSError:
        return ""
    return line[2:].strip() if line.startswith("# ") else ""


def archive_of(resumed: Optional[Resumed], given: Optional[str]) -> Optional[str]:
    """Resolve model.archive.

    If a run is resumed with the same value, the path that was recorded at its start is used if it still exists, because LATEST may point
    elsewhere by now. check_same_data compares the weights. A run's folder becomes that of its newest checkpoint, a link its target.
    """
    if given is None:
        return None
    if resumed is not None and given == resumed.progress.config["model"]["archive"]:
        saved = resumed.progress.reference["archive"]
        if saved is not None and os.path.exists(saved):
            return saved
    if os.path.isdir(given) and not os.path.exists(os.path.join(given, "config.json")):
        folder = checkpoint_of(given)
        given = folder or given
        if folder is not None and has_no_policy(folder) and os.path.isdir(os.path.join(folder, ADAPTER)):
            given = os.path.join(folder, ADAPTER)
    return os.path.realpath(given)


def check_seen_by_all(world: World, run_dir: str) -> None:
    """Raise UserError if a rank does not see what rank 0 has written into the run's folder. Called on all ranks; waits up to 30 s."""
    path, end = os.path.join(run_dir, CONFIG), time.monotonic() + 30
    with world.agreed():
        while not os.path.exists(path):  # a network disk may take its time
            if time.monotonic() > end:
                raise UserError(f"{run_dir} is not the same folder for all ranks (not for rank {world.rank}): use a disk that they share")
            time.sleep(0.5)


class RunFolder:
    """A context manager for a run's folder, entered on all ranks: creates the folder, locks out other runs, and finds what to resume.

    Nothing in the folder is changed before `begin`. If the block raises a UserError before anything was logged or saved, config.yaml is
    removed, so that the corrected command can start a new run in the folder; a folder that was created and stayed empty is removed too.

    Args:
        world: the run's ranks.
        config: a checked config.
        objective: the loss, with its hyperparameters.

    Raises:
        UserError: the folder cannot be used, another run writes into it, all checkpoints that `resume` could use are damaged, or they are
            from a run with another config.
    """

    def __init__(self, world: World, config: DictConfig, objective: Objective):
        self.world, self.config, self.objective = world, config, objective
        self.path = ""
        self.resumed: Optional[Resumed] = None  # the checkpoint to resume from; None for a new run
        self._damaged: list[str] = []
        self._lock: Optional[FolderLock] = None
        self._began = False

    def __enter__(self) -> "RunFolder":
        self.path = self.world.from_first(self._open)
        try:
            self.resumed, self._damaged = _find_checkpoint(self.world, self.path, self.config, self.objective)
        except BaseException:
            self._close()
            raise
        return self

    def _open(self) -> str:
        """Choose, create and lock the folder. What was found before the lock counts only if it still holds."""
        path = choose_run_dir(self.config)
        try:
            self._lock = FolderLock(path)
            check_run_dir(self.config, path)
        except OSError as error:
            self._close()
            raise _not_writable(path, error) from None
        except UserError:
            self._close()
            raise
        return path

    def begin(self, template: Optional[str] = None) -> None:
        """Prepare the folder for writing: from now on the run is under way, or resumed. Called on all ranks.

        Args:
            template: the chat template with which rows are rendered, which is kept, because its file may change; None: there is none.
        """
        with self.world.agreed():
            try:
                if self.world.is_first:
                    prepare_run_dir(self.path, self.resumed, self._damaged)
                    command = command_of(self.path) or own_command()
                    with replaced_whole(os.path.join(self.path, CONFIG)) as file:
                        file.write(f"# {command}\n" if command else "")
                        OmegaConf.save(self.config, file)
                    if isinstance(template, str):
                        with replaced_whole(os.path.join(self.path, TEMPLATE)) as file:
                            file.write(template)
                    self._began = True
            except OSError as error:
                raise _not_writable(self.path, error) from None
        check_seen_by_all(self.world, self.path)
        log.info("=" * 80 + f"\nWriting to {socket.gethostname()}:{self.path}\n" + "=" * 80)

    def __exit__(self, kind: Optional[type], *_: object) -> None:
        if self._lock is None:
            return
        with suppress(OSError):  # the folder may be gone
            failed_early = kind is not None and issubclass(kind, UserError) and not {"metrics.jsonl", "LATEST"} & set(os.listdir(self.path))
            if self._began and failed_early:
                os.remove(os.path.join(self.path, CONFIG))
                os.remove(os.path.join(self.path, TEMPLATE))
        self._close()

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _not_writable(path: str, error: OSError) -> UserError:
    return UserError(f"local_run_dir={path} cannot be written: {reason_of(error)}")


class FolderLock:
    """A lock that keeps other runs out of a folder until it is released or this process ends. Creates the folder if needed.

    It is waited for, because a requeued job may overlap with its predecessor.

    Raises:
        OSError: the folder cannot be created or read.
        UserError: another run still has the lock after LOCK_PATIENCE seconds.
    """

    def __init__(self, run_dir: str):
        self.run_dir, self.handle = run_dir, -1
        self._created: list[str] = []  # folders, the innermost first
        end, told = time.monotonic() + LOCK_PATIENCE, False
        while not self._taken():
            self.release()
            if time.monotonic() > end:
                raise UserError(f"another run writes into {run_dir}: wait until it has ended, or choose another folder")
            if not told:
                log.info(f"waiting for another run to leave {run_dir}, at most {LOCK_PATIENCE:.0f} seconds")
                told = True
            time.sleep(0.5)

    def _taken(self) -> bool:
        """Try to take the lock. The folder may have been removed, and created anew, between opening and locking it."""
        if not os.path.isdir(self.run_dir):
            folder = os.path.abspath(self.run_dir)
            self._created = []
            while not os.path.lexists(folder):
                self._created.append(folder)
                folder = os.path.dirname(folder)
            os.makedirs(self.run_dir, exist_ok=True)
        self.handle = os.open(self.run_dir, os.O_RDONLY)
        if not try_lock(self.handle):
            return False
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.handle), os.stat(self.run_dir))
        return False

    def release(self) -> None:
        """Release the lock; folders that were created and are still empty are removed first."""
        if self.handle < 0:
            return
        if self._created and try_lock(self.handle):
            with suppress(OSError):
                for folder in self._created:
                    os.rmdir(folder)
        os.close(self.handle)
        self.handle = -1


def prepare_run_dir(run_dir: str, resumed: Optional[Resumed], damaged: Sequence[str]) -> None:
    """Prepare a run's folder for writing.

    Unfinished checkpoints are removed, damaged ones renamed to <name>.old. For a new run, old logs are renamed too. For a resumed one,
    logs are cut back to its checkpoint, and LATEST points to it.

    Args:
        run_dir: the folder, locked.
        resumed: the checkpoint to resume from; None for a new run.
        damaged: folders of checkpoints that were found damaged.
    """
    for name in os.listdir(run_dir):
        if name.startswith("step-") and name.endswith(".tmp"):
            with suppress(OSError):
                remove(os.path.join(run_dir, name))
    for folder in damaged:
        set_aside(folder)
    if resumed is not None:
        point(run_dir, LATEST, os.path.basename(resumed.folder))
    for name in LOGS:
        path = os.path.join(run_dir, name)
        if resumed is None:
            set_aside(path)
        else:
            progress = resumed.progress
            cut_back(path, progress.examples, progress.evaluated_at == progress.examples)
