"""Checkpoints on disk: written whole or not at all, read without running what they hold.

<run_dir>/step-<examples>/policy.pt      {'step_idx', 'state', 'metrics'}, as published
<run_dir>/step-<examples>/state/         what resuming needs: torch.distributed.checkpoint's shards, and progress.json
<run_dir>/step-<examples>/hf/            in the last one, a folder for AutoModelForCausalLM.from_pretrained
<run_dir>/step-<examples>/manifest.json  sizes and SHA-256 of the others
<run_dir>/LATEST -> step-<examples>      a relative link to the newest whole checkpoint
"""

import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tdpo.distributed.world import World, is_of_a_collective
from tdpo.utils import PeerError, RunError, get_logger, some_of

log = get_logger(__name__)

PROGRESS = os.path.join("state", "progress.json")
NOT_HASHED = ("manifest.json", "hf")  # the latter may be added later


def save_checkpoint(
    world: World,
    run_dir: str,
    policy: Mapping[str, torch.Tensor],
    tensors: Mapping[str, Any],
    progress: Mapping[str, Any],
    export: Optional[Callable[[str], None]] = None,
) -> str:
    """Write step-<examples>/ under a temporary name, rename it, and point LATEST to it. Called by all ranks.

    Args:
        run_dir: the run's folder.
        policy: the policy's whole state dict; of interest on rank 0 alone.
        tensors: nested dicts of tensors, whole or sharded: what resuming needs.
        progress: the rest of it, as JSON has it; its `examples` and `eval_metrics` (plain floats) go into policy.pt too.
        export: writes a Hugging Face model into the folder it is given; called on rank 0.

    Returns:
        the checkpoint's folder.

    Raises:
        RunError: it could not be written. What was there before is untouched.
    """
    examples = progress["examples"]
    target = os.path.join(run_dir, f"step-{examples}")
    temporary = target + ".tmp"
    needed = _bytes(policy) * (2 if export else 1) + _bytes(tensors)
    with world.agreed():
        if world.is_first:
            _make_room(run_dir, target, temporary, needed)
    with _removed_on_failure(world, target, temporary):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process; that internal types will change
            dcp.save(dict(tensors), checkpoint_id=os.path.join(temporary, "state"), **_group(world))
        with world.agreed():
            if world.is_first:
                metrics = {name: float(value) for name, value in progress["eval_metrics"].items()}
                content = {"step_idx": examples, "state": dict(policy), "metrics": metrics}
                torch.save(content, os.path.join(temporary, "policy.pt"))
                _write_json(os.path.join(temporary, PROGRESS), progress)
                if export is not None:
                    _try_export(export, os.path.join(temporary, "hf"))
        files = world.from_first(lambda: sorted(_files(temporary)))
        with world.agreed():
            own = {file: _entry(temporary, file) for file in files[world.rank :: world.size]}
        manifest = {"files": _union(world.gather(own))}
        with world.agreed():
            if world.is_first:
                _write_json(os.path.join(temporary, "manifest.json"), manifest)
                _sync(temporary)
                os.rename(temporary, target)
                _sync_folder(run_dir)
                point_latest(run_dir, os.path.basename(target))
    return target


def _group(world: World) -> dict[str, Any]:
    """How torch.distributed.checkpoint finds the other ranks."""
    return {"no_dist": True} if world.size == 1 else {"process_group": world.long_timeout_group}


def _bytes(tensors: Mapping[str, Any]) -> int:
    """Of the whole tensors, also where this rank has but a shard of them."""
    values = (_bytes(value) if isinstance(value, Mapping) else value.numel() * value.element_size() for value in tensors.values())
    return sum(values)


def _make_room(run_dir: str, target: str, temporary: str, needed: int) -> None:
    if os.path.exists(os.path.join(target, "manifest.json")):
        raise RunError(f"{target} exists already; a checkpoint is never overwritten")
    latest = os.path.join(run_dir, "LATEST")
    if os.path.exists(latest) and not os.path.islink(latest):
        raise RunError(f"{latest} is a folder, of a run of the published code: move it away, or use another local_run_dir")
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise RunError(f"{target} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room; the last checkpoint is untouched")
    try:
        set_aside(target)  # what is no whole checkpoint
        if os.path.exists(temporary):  # of a run that died while it wrote
            shutil.rmtree(temporary)
        os.makedirs(os.path.join(temporary, "state"))
    except OSError as error:
        raise RunError(f"{target} could not be written ({error}); the last checkpoint is untouched") from error


@contextmanager
def _removed_on_failure(world: World, target: str, temporary: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:  # torch reports a full disk as a RuntimeError
        if is_of_a_collective(error):
            raise
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointException) and not world.is_first:  # it is raised in all ranks: one says so
            raise PeerError("the checkpoint could not be written") from error
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{target} could not be written ({reason}); the last checkpoint is untouched") from error
    except Exception:  # another rank's failure
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _files(folder: str) -> Iterator[str]:
    """Relative paths of the files that the manifest lists."""
    for place, folders, files in os.walk(folder):
        if place == folder:
            folders[:] = [name for name in folders if name not in NOT_HASHED]
        yield from (os.path.relpath(os.path.join(place, file), folder) for file in files if file not in NOT_HASHED)


def _entry(folder: str, file: str) -> dict[str, Any]:
    """Of the manifest: size and SHA-256 of a file."""
    path = os.path.join(folder, file)
    with open(path, "rb") as handle:
        return {"size": os.path.getsize(path), "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _is_sound(folder: str, file: str, expected: Any) -> bool:
    try:
        return _entry(folder, file) == expected
    except OSError:
        return False


def _union(dicts: Iterable[dict]) -> dict:
    return {key: value for some in dicts for key, value in some.items()}


def _write_json(path: str, value: Any) -> None:
    with open(path, "w") as handle:
        json.dump(value, handle, indent=1)


def add_export(world: World, folder: str, export: Callable[[str], None]) -> None:
    """hf/ in a checkpoint that was written without it."""
    final, temporary = os.path.join(folder, "hf"), os.path.join(folder, "hf.tmp")
    with world.agreed():
        if world.is_first and not os.path.exists(final):
            shutil.rmtree(temporary, ignore_errors=True)
            _try_export(export, temporary)
            if os.path.exists(temporary):
                _sync(temporary)
                os.rename(temporary, final)


def remove_old(run_dir: str, keep: int, never: Iterable[str]) -> None:
    """Remove all but the newest `keep` whole checkpoints, never LATEST's nor those named. A failure is a warning."""
    latest = os.path.realpath(os.path.join(run_dir, "LATEST"))
    kept = {latest, *(os.path.realpath(folder) for folder in never)}
    for folder in list_checkpoints(run_dir)[keep:]:
        if os.path.realpath(folder) in kept:
            continue
        try:
            # Renamed first: a folder that is half removed must not look like a checkpoint.
            os.rename(folder, folder + ".tmp")
            shutil.rmtree(folder + ".tmp")
        except OSError as error:
            log.warning(f"the old checkpoint {folder} could not be removed ({error})")


def set_aside(path: str) -> None:
    """Give what lies in the way of a new file or folder another name, <path>.old, .old.1 and so on; nothing where nothing is."""
    names = [f"{path}.old", *(f"{path}.old.{i}" for i in range(1, 10_000))]
    if os.path.lexists(path):
        os.rename(path, next(name for name in names if not os.path.lexists(name)))


def list_checkpoints(run_dir: str) -> list[str]:
    """Folders of whole checkpoints that a run can resume from, newest first. Whether they are sound, damaged_files says."""
    found = []
    for name in os.listdir(run_dir) if os.path.isdir(run_dir) else []:
        number = name.removeprefix("step-")
        if name.startswith("step-") and number.isdigit():
            folder = os.path.join(run_dir, name)
            if os.path.exists(os.path.join(folder, "manifest.json")):
                found.append((int(number), folder))
            else:
                log.warning(f"{folder} is not a whole checkpoint of this program (no manifest.json): ignored")
    return [folder for _, folder in sorted(found, reverse=True)]


def damaged_files(world: World, folder: str) -> list[str]:
    """Files of a checkpoint that are missing, or not what the manifest says; read by all ranks together."""
    expected = world.from_first(lambda: _read_manifest(folder))
    if expected is None:
        return ["manifest.json"]
    wrong = [file for file in sorted(expected)[world.rank :: world.size] if not _is_sound(folder, file, expected[file])]
    return sorted(file for files in world.gather(wrong) for file in files)


def _read_manifest(folder: str) -> Optional[dict[str, dict]]:
    """Sizes and hashes by file; None where it is none."""
    try:
        with open(os.path.join(folder, "manifest.json")) as handle:
            files = json.load(handle)["files"]
        return files if {"policy.pt", PROGRESS} <= set(files) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def saved_tensors(folder: str) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of what a checkpoint's state/ holds, by dotted name."""
    return dict(_Reader(os.path.join(folder, "state")).read_metadata().state_dict_metadata)


def load_tensors(world: World, folder: str, tensors: Mapping[str, Any]) -> None:
    """Fill tensors, whole or sharded, from a checkpoint of any number of ranks. Called by all ranks.

    Raises:
        RunError: it holds others, or of other shapes or dtypes (torch would cast in silence).
    """
    with world.agreed():
        saved, own = saved_tensors(folder), dict(_flat(tensors))
        wrong = [name for name in saved if name.startswith(("policy.", "optimizer.", "reference.")) and name not in own]
        for name, tensor in own.items():
            entry = saved.get(name)
            if entry is None or entry.size != tensor.size() or entry.properties.dtype != tensor.dtype:
                wrong.append(name)
        if wrong:
            raise RunError(f"{folder} does not fit this run: {some_of(sorted(wrong), 4)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = _Reader(os.path.join(folder, "state"))
        try:
            dcp.load(dict(tensors), storage_reader=reader, planner=_TensorsAlone(), **_group(world))
        except CheckpointException as error:  # which is no Exception, and is raised in all ranks
            reason = " ".join(str(error).split())[:300]
            raise (RunError if world.is_first else PeerError)(f"{folder} could not be read ({reason})") from error


def _flat(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class _TensorsAlone(dcp.DefaultLoadPlanner):
    """Everything that is no tensor is in progress.json: nothing else is unpickled."""

    def load_bytes(self, *_: Any) -> None:
        raise RunError("a checkpoint's state holds what this program never writes: not loaded")


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint's index, which is a pickle, without running what it might hold."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(os.path.join(self.path, ".metadata"), "rb") as handle:
            metadata = _Unpickler(handle).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows the types of a checkpoint's index alone."""

    KNOWN = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
        "collections": {"OrderedDict"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.KNOWN.get(module, ()):
            raise RunError(f"a checkpoint's index names {module}.{name}, which no checkpoint needs: not loaded")
        return super().find_class(module, name)


def _try_export(export: Callable[[str], None], folder: str) -> None:
    """Transformers refuses to write some models, for the generation settings they came with: the weights in policy.pt matter more."""
    try:
        export(folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        log.warning(f"no Hugging Face folder was written ({' '.join(str(error).split())[:200]}); policy.pt has the weights")


def _sync(folder: str) -> None:
    """Force the folder's files to the disk before it gets its final name."""
    for place, _, files in os.walk(folder):
        for file in files:
            with open(os.path.join(place, file), "rb") as handle:
                os.fsync(handle.fileno())
        _sync_folder(place)


def _sync_folder(folder: str) -> None:
    """Force a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point_latest(run_dir: str, name: str) -> None:
    """LATEST always names a whole checkpoint: a new link replaces the old one in one step."""
    temporary = os.path.join(run_dir, "LATEST.tmp")
    if os.path.lexists(temporary):
        os.remove(temporary)
    os.symlink(name, temporary)
    os.replace(temporary, os.path.join(run_dir, "LATEST"))


def holds_a_run(run_dir: str) -> bool:
    """Whether a run has written into this folder."""
    if not os.path.isdir(run_dir):
        return False
    return any(name in ("config.yaml", "metrics.jsonl", "LATEST") or name.startswith("step-") for name in os.listdir(run_dir))
