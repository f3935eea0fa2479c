"""Read the tensors in a checkpoint's state/, which any number of ranks may have written, without executing anything in it."""

import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from tdpo.distributed.world import World
from tdpo.files import reason_of, was_interrupted
from tdpo.utils import PeerError, RunError, some_of


def group_of(world: World) -> dict[str, Any]:
    """Return the arguments by which torch.distributed.checkpoint finds the other ranks."""
    return {"no_dist": True} if world.size == 1 else {"process_group": world.long_timeout_group}


def read_policy(folder: str) -> dict[str, torch.Tensor]:
    """Return the policy's state dict from a checkpoint's state/, in memory, on the CPU. Its files must be undamaged (damaged_files).

    Raises:
        RunError: it cannot be read.
    """
    prefix = "policy."
    entries = {name: entry for name, entry in saved_tensors(folder).items() if name.startswith(prefix)}
    policy = {name.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    _load(World(), folder, {"policy": policy})
    return policy


def saved_tensors(folder: str) -> dict[str, TensorStorageMetadata]:
    """Return the metadata (shape, dtype) of the tensors in a checkpoint's state/, by dotted name."""
    return dict(StateReader(os.path.join(folder, "state")).read_metadata().state_dict_metadata)


def load_tensors(world: World, folder: str, tensors: Mapping[str, Any]) -> None:
    """Fill tensors from a checkpoint that any number of ranks may have written. Called on all ranks.

    Args:
        world: the run's ranks.
        folder: the checkpoint's folder.
        tensors: nested dicts of tensors, whole or sharded, as save_checkpoint takes them; filled in place.

    Raises:
        RunError: names, shapes or dtypes of the tensors differ (torch would cast silently), or the checkpoint cannot be read.
    """
    with world.agreed():
        saved, own = saved_tensors(folder), dict(_flat(tensors))
        wrong = [name for name in saved if name.startswith(("policy.", "optimizer.", "reference.")) and name not in own]
        for name, tensor in own.items():
            entry = saved.get(name)
            if entry is None or entry.size != tensor.size() or entry.properties.dtype != tensor.dtype:
                wrong.append(name)
        if wrong:
            raise RunError(f"{folder} does not fit this run: missing, unknown, or of another shape or dtype: {some_of(sorted(wrong), 4)}")
    _load(world, folder, tensors)


def _load(world: World, folder: str, tensors: Mapping[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = StateReader(os.path.join(folder, "state"))
        try:
            dcp.load(dict(tensors), storage_reader=reader, planner=_TensorsAlone(), **group_of(world))
        except CheckpointException as error:  # not an Exception, and raised on all ranks
            if was_interrupted(error):
                raise KeyboardInterrupt from error
            raise (RunError if world.is_first else PeerError)(f"{folder} could not be read ({reason_of(error)})") from error


def _flat(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class _TensorsAlone(dcp.DefaultLoadPlanner):
    """A load planner that refuses all but tensors, so that nothing is unpickled. What is not a tensor is in progress.json."""

    def load_bytes(self, *_: Any) -> None:
        raise RunError("a checkpoint's state holds an object other than a tensor, which this program never writes: not loaded")


class StateReader(dcp.FileSystemReader):
    """A reader that unpickles a checkpoint's index without executing anything in it."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with open(os.path.join(self.path, ".metadata"), "rb") as handle:
            metadata = _Unpickler(handle).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """An unpickler that accepts only the types of a checkpoint's index."""

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
