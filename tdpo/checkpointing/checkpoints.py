"""Checkpoints on disk: written completely or not at all, and read without executing anything in them.

<run_dir>/step-<examples>/policy.pt      {'step_idx', 'state', 'metrics'}, as published; left out if save_policy says so
<run_dir>/step-<examples>/state/         what resuming needs: shards of torch.distributed.checkpoint, and progress.json
<run_dir>/step-<examples>/adapter/       of a run with adapters: a folder of peft's form
<run_dir>/step-<examples>/hf/            in the checkpoint with which a run ended: a folder for AutoModelForCausalLM.from_pretrained
<run_dir>/step-<examples>/manifest.json  size and SHA-256 of the other files, except those of hf/
<run_dir>/LATEST -> step-<examples>      a relative link to the newest complete checkpoint
<run_dir>/BEST -> step-<examples>        with keep_best, a link to the best one

<examples> counts train examples, as published. A checkpoint is complete if it has its final name and manifest.json.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Optional

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tdpo.checkpointing.state_reader import StateReader, group_of
from tdpo.distributed.world import World, is_of_a_collective
from tdpo.files import entries_of, is_regular, make_free, reason_of, remove, replaced_whole, set_aside, usual_modes, was_interrupted
from tdpo.utils import PeerError, RunError, as_bytes, get_logger, some_of

log = get_logger(__name__)

LATEST, BEST = "LATEST", "BEST"
POLICY = "policy.pt"
ADAPTER = "adapter"
PROGRESS = os.path.join("state", "progress.json")
INDEX = os.path.join("state", ".metadata")
NOT_HASHED = ("manifest.json", "hf")  # hf/ may be added later


def save_checkpoint(
    world: World,
    run_dir: str,
    policy: Optional[Mapping[str, torch.Tensor]],
    tensors: Mapping[str, Any],
    progress: Mapping[str, Any],
    export: Optional[Callable[[str], None]] = None,
    save_adapter: Optional[Callable[[str], None]] = None,
) -> str:
    """Write step-<examples>/ under a temporary name, rename it, and point LATEST to it. Called on all ranks.

    Args:
        world: the run's ranks.
        run_dir: the run's folder.
        policy: the policy's whole state dict, used on rank 0 only; None on all ranks: no policy.pt.
        tensors: what resuming needs: nested dicts of tensors, whole or sharded.
        progress: Progress as a JSON-serializable dict; its `examples` and `eval_metrics` (plain floats) go into policy.pt too.
        export: writes a Hugging Face model into the folder that it is given; called on rank 0. None: no hf/.
        save_adapter: writes adapters into the folder that it is given; called on rank 0. None: no adapter/.

    Returns:
        the path of the checkpoint's folder.

    Raises:
        RunError: the checkpoint could not be written; earlier ones are untouched.
    """
    target = os.path.join(run_dir, f"step-{progress['examples']}")
    temporary = target + ".tmp"
    needed = (0 if policy is None else _bytes(policy)) + (_bytes(tensors["policy"]) if export else 0) + _bytes(tensors)
    with world.agreed():
        if world.is_first:
            _make_room(run_dir, target, temporary, needed)
    with _removed_on_failure(world, target, temporary, needed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about saving with one process and about its own internal types
            dcp.save(dict(tensors), checkpoint_id=os.path.join(temporary, "state"), **group_of(world))
        with world.agreed():
            if world.is_first:
                if policy is not None:
                    _write_policy(os.path.join(temporary, POLICY), policy, progress)
                _write_json(os.path.join(temporary, PROGRESS), progress)
                if save_adapter is not None:
                    save_adapter(os.path.join(temporary, ADAPTER))
                if export is not None:
                    _try_export(export, os.path.join(temporary, "hf"))
        files = world.from_first(lambda: sorted(_files(temporary)))
        with world.agreed():
            own = entries_of(temporary, files[world.rank :: world.size], "Hashing the checkpoint")
            if unreadable := [file for file, entry in own.items() if entry is None]:
                raise OSError(f"{some_of(unreadable)} cannot be read after writing")
        manifest = {"files": _union(world.gather(own))}
        with world.agreed():
            if world.is_first:
                _write_json(os.path.join(temporary, "manifest.json"), manifest)
                _sync(temporary)
                os.rename(temporary, target)
                _sync_folder(run_dir)
                point(run_dir, LATEST, os.path.basename(target))
    return target


def _write_policy(path: str, policy: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
    metrics = {name: float(value) for name, value in progress["eval_metrics"].items()}
    torch.save({"step_idx": progress["examples"], "state": dict(policy), "metrics": metrics}, path)


def _bytes(tensors: Mapping[str, Any]) -> int:
    """Return the bytes of the whole tensors, even if this rank holds only shards of them."""
    values = (_bytes(value) if isinstance(value, Mapping) else value.numel() * value.element_size() for value in tensors.values())
    return sum(values)


def _make_room(run_dir: str, target: str, temporary: str, needed: int) -> None:
    """Check that the checkpoint can be written, rename an incomplete one to .old, create the temporary folder. `needed` is in bytes."""
    if is_regular(os.path.join(target, "manifest.json")):
        raise RunError(f"{target} exists already; a checkpoint is never overwritten")
    latest = os.path.join(run_dir, "LATEST")
    if os.path.exists(latest) and not os.path.islink(latest):
        raise RunError(f"{latest} is a folder, written by the published code: move it away, or use another local_run_dir")
    try:
        free = shutil.disk_usage(run_dir).free
        if free < needed:
            raise RunError(_not_written(target, "too little space", needed, free))
        set_aside(target)  # an incomplete checkpoint
        if os.path.lexists(temporary):  # of a run that was killed while writing
            remove(temporary)
        os.makedirs(os.path.join(temporary, "state"))
    except OSError as error:
        raise RunError(f"{target} could not be written ({reason_of(error)}); the last checkpoint is untouched") from error


def _not_written(target: str, reason: str, needed: int, free: int) -> str:
    amounts = f"{as_bytes(needed)} needed, {as_bytes(free)} free"
    return f"{target} could not be written ({reason}; {amounts}); the last checkpoint is untouched"


@contextmanager
def _removed_on_failure(world: World, target: str, temporary: str, needed: int) -> Iterator[None]:
    """Remove the temporary folder if the block fails; turn write errors into RunError, or PeerError if another rank reports the error."""
    try:
        yield
    except BaseException as error:
        if is_of_a_collective(error):
            raise
        interrupted = was_interrupted(error)
        free = _free(target)  # before the folder is removed
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        if interrupted:
            raise KeyboardInterrupt from error
        if isinstance(error, CheckpointException) and not world.is_first:  # raised on all ranks; one reports it
            raise PeerError("the checkpoint could not be written") from error
        if isinstance(error, (OSError, RuntimeError, CheckpointException)):  # torch reports a full disk as a RuntimeError
            raise RunError(_not_written(target, reason_of(error), needed, free)) from error
        raise  # usually PeerError: another rank failed


def _free(target: str) -> int:
    """Return the free bytes of the disk that holds the checkpoint; 0 if its folder is gone."""
    try:
        return shutil.disk_usage(os.path.dirname(target)).free
    except OSError:
        return 0


def _files(folder: str) -> Iterator[str]:
    """Yield the relative paths of the files that the manifest lists."""
    for place, folders, files in os.walk(folder):
        if place == folder:
            folders[:] = [name for name in folders if name not in NOT_HASHED]
        yield from (os.path.relpath(os.path.join(place, file), folder) for file in files if file not in NOT_HASHED)


def _union(dicts: Iterable[dict]) -> dict:
    return {key: value for some in dicts for key, value in some.items()}


def _write_json(path: str, value: Any) -> None:
    with replaced_whole(path) as handle:
        json.dump(value, handle, indent=1)


def complete_checkpoint(
    world: World,
    folder: str,
    policy: Optional[Mapping[str, torch.Tensor]],
    progress: Mapping[str, Any],
    export: Callable[[str], None],
) -> None:
    """Add hf/ and policy.pt to a checkpoint that was written without them. Called on all ranks.

    Args:
        world: the run's ranks.
        folder: the checkpoint's folder.
        policy, progress, export: see save_checkpoint.

    Raises:
        RunError: policy.pt could not be written; the checkpoint is as before.
    """
    with world.agreed():
        if not world.is_first:
            return
        final, temporary = os.path.join(folder, "hf"), os.path.join(folder, "hf.tmp")
        if not os.path.exists(final):
            shutil.rmtree(temporary, ignore_errors=True)
            _try_export(export, temporary)
            if os.path.exists(temporary):
                _sync(temporary)
                os.rename(temporary, final)
        files = _read_manifest(folder) or {}
        if policy is None or POLICY in files:
            return
        new = os.path.join(folder, POLICY + ".tmp")
        try:
            make_free(new)
            _write_policy(new, policy, progress)
            _sync_file(new)
            entry = entries_of(folder, [POLICY + ".tmp"], "Hashing policy.pt")[POLICY + ".tmp"]
            # The manifest first: whoever finds it without policy.pt renames the file, see _finish.
            _write_json(os.path.join(folder, "manifest.json"), {"files": {**files, POLICY: entry}})
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                os.remove(new)
            raise RunError(
                f"{os.path.join(folder, POLICY)} could not be written ({reason_of(error)}); the checkpoint is as before"
            ) from error
        _finish(folder)


def _finish(folder: str) -> None:
    """Give policy.pt its name, if the process that added it was killed after the manifest listed it."""
    final = os.path.join(folder, POLICY)
    if POLICY in (_read_manifest(folder) or {}) and not os.path.lexists(final) and is_regular(final + ".tmp"):
        with suppress(OSError):  # a reader may lack the permission
            os.rename(final + ".tmp", final)


def remove_old(run_dir: str, keep: int, never: Iterable[str]) -> None:
    """Remove all but the newest `keep` complete checkpoints; never the targets of LATEST and BEST or a folder in `never`. Log a failure."""
    kept = {os.path.realpath(folder) for folder in [*(os.path.join(run_dir, link) for link in (LATEST, BEST)), *never]}
    for folder in list_checkpoints(run_dir)[keep:]:
        if os.path.realpath(folder) in kept:
            continue
        try:
            # Renamed first, because a folder that is half removed must not look like a checkpoint.
            if os.path.lexists(temporary := folder + ".tmp"):  # an earlier removal failed
                remove(temporary)
            os.rename(folder, temporary)
            remove(temporary)
        except OSError as error:
            log.warning(f"the old checkpoint {folder} could not be removed ({error})")


def list_checkpoints(run_dir: str, tell: bool = False) -> list[str]:
    """Return the folders of the complete checkpoints in a run's folder, newest first. Their files may be damaged, see damaged_files.

    Args:
        run_dir: the run's folder, which may not exist.
        tell: log a warning for each folder that is ignored.
    """
    found = []
    for name in os.listdir(run_dir) if os.path.isdir(run_dir) else []:
        if number := re.fullmatch("step-([0-9]+)", name):
            folder = os.path.join(run_dir, name)
            if is_regular(os.path.join(folder, "manifest.json")):
                found.append((int(number[1]), folder))
            elif tell:
                log.warning(f"{folder} is not a complete checkpoint of this program (no manifest.json): ignored")
    return [folder for _, folder in sorted(found, reverse=True)]


def checkpoint_of(path: str) -> Optional[str]:
    """Return the folder of the checkpoint that a path names: a checkpoint, or a run's folder, whose LATEST counts; None if neither."""
    if is_regular(os.path.join(path, "manifest.json")):
        return path
    latest = os.path.realpath(os.path.join(path, "LATEST"))  # of this moment: a run that is being trained moves the link
    if is_regular(os.path.join(latest, "manifest.json")) or is_regular(os.path.join(latest, POLICY)):
        return latest
    return next(iter(list_checkpoints(path)), None)


def damaged_files(world: World, folder: str) -> list[str]:
    """Return the files of a checkpoint that are missing, differ from the manifest, or are not listed there. Called on all ranks."""
    expected = world.from_first(lambda: (_finish(folder), _read_manifest(folder))[1])
    if expected is None:
        return ["manifest.json"]
    own = sorted(expected)[world.rank :: world.size]
    found = entries_of(folder, own, f"Checking {os.path.basename(folder)}")
    wrong = [file for files in world.gather([file for file in own if found[file] != expected[file]]) for file in files]
    return sorted(wrong) or world.from_first(lambda: _not_listed(folder, expected))


def _read_manifest(folder: str) -> Optional[dict[str, dict]]:
    """Return sizes and hashes by file; None if there is no valid manifest, or one that names files elsewhere."""
    path = os.path.join(folder, "manifest.json")
    try:
        if not is_regular(path):
            return None
        with open(path, encoding="utf-8") as handle:
            files = json.load(handle)["files"]
        if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
            return None
        inside = all(not os.path.isabs(file) and ".." not in file.split(os.sep) for file in files)
        return files if inside and {INDEX, PROGRESS} <= set(files) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _not_listed(folder: str, listed: Mapping[str, Any]) -> list[str]:
    """Return the files that a checkpoint consists of but its manifest does not list: all that exist or that its index names."""
    there = [file for file in _files(folder) if file == POLICY or file.endswith(".distcp")]
    try:
        index = StateReader(os.path.join(folder, "state")).read_metadata()
        named = [os.path.join("state", entry.relative_path) for entry in index.storage_data.values()]
    except Exception:  # whatever unpickling raises
        return [INDEX]
    return sorted({*there, *named} - set(listed))


def has_no_policy(folder: str) -> bool:
    """Whether a checkpoint was saved without policy.pt (save_policy)."""
    files = _read_manifest(folder)
    return files is not None and POLICY not in files


def policy_is_sound(path: str) -> bool:
    """Whether a file named policy.pt, or a link to one, has the size and hash in the manifest beside it; True if there is no manifest."""
    folder, name = os.path.split(os.path.realpath(path))
    if name != POLICY or not os.path.lexists(os.path.join(folder, "manifest.json")):
        return True
    expected = (_read_manifest(folder) or {}).get(POLICY)
    return expected is not None and entries_of(folder, [POLICY], "Checking policy.pt")[POLICY] == expected


def _try_export(export: Callable[[str], None], folder: str) -> None:
    """Export; a failure only logs a warning. Transformers refuses to save some models because of their generation settings."""
    try:
        export(folder)
        usual_modes(folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        log.warning(f"no Hugging Face folder was written ({' '.join(str(error).split())[:200]}); the checkpoint has the weights")


def _sync(folder: str) -> None:
    """Force a folder's files to disk, so that they are there before the folder gets its final name."""
    for place, _, files in os.walk(folder):
        for file in files:
            _sync_file(os.path.join(place, file))
        _sync_folder(place)


def _sync_file(path: str) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: str) -> None:
    """Force a folder's list of entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point(run_dir: str, link: str, name: str) -> None:
    """Point LATEST or BEST to the checkpoint `name`. A new link replaces the old one atomically."""
    temporary = os.path.join(run_dir, f"{link}.tmp")
    make_free(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, os.path.join(run_dir, link))


def holds_a_run(run_dir: str) -> bool:
    """Whether the folder contains files with the names that a run writes."""
    if not os.path.isdir(run_dir):
        return False
    return any(name in ("config.yaml", "metrics.jsonl", LATEST, BEST) or name.startswith("step-") for name in os.listdir(run_dir))
