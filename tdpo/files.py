"""Files: written whole or not at all, hashed, removed if a killed process left them behind, and write errors in words."""

import glob
import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import IO, Any, Optional

import tqdm

from tdpo.utils import cores, try_lock

BUFFER = 2**20  # bytes that are read at a time
PIECE = 2**26  # bytes of a large file that a core hashes at a time
SHOWN = 4 * 2**30  # bytes from which on hashing shows a progress bar: a few seconds


@contextmanager
def replaced_whole(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a new file that takes the place of `path` at the end of the block; after an error, `path` stays as it was.

    Args:
        path: of the file; what other processes read is either the old or the new content.
        mode: "w" (text in UTF-8) or "wb".

    Raises:
        OSError: the file cannot be written.
    """
    temporary = f"{path}.tmp"
    make_free(temporary)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def append_lines(path: str, rows: Iterable[Mapping]) -> None:
    """Append rows to a file of JSON lines: all of them, or none if the file cannot be written.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    with open(path, "ab", buffering=0) as handle:
        before = handle.seek(0, os.SEEK_END)
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            while content:
                content = content[handle.write(content) :]
        except OSError:
            with suppress(OSError):
                handle.truncate(before)
            raise


def set_aside(path: str) -> None:
    """Rename a file or folder to <path>.old, .old.1 and so on, so that the name is free; do nothing if it does not exist."""
    if os.path.lexists(path):
        os.rename(path, _name_aside(path))


def keep_copy(path: str) -> None:
    """Keep the content that a file has now as <path>.old, .old.1 and so on; the file itself stays, to be replaced as a whole."""
    old = _name_aside(path)
    try:
        os.link(path, old)
    except OSError:  # no hard links on this disk
        shutil.copy2(path, old)


def _name_aside(path: str) -> str:
    names = [f"{path}.old", *(f"{path}.old.{i}" for i in range(1, 10_000))]
    return next(name for name in names if not os.path.lexists(name))


def make_free(temporary: str) -> None:
    """Remove the file or link that a killed process left under a temporary name; a folder there is not ours, and is set aside."""
    if os.path.isdir(temporary) and not os.path.islink(temporary):
        set_aside(temporary)
    elif os.path.lexists(temporary):
        os.remove(temporary)


def is_regular(path: str) -> bool:
    """Whether `path` is a file or a link to one: opening anything else, such as a pipe, may fail or block for ever."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


# --- hashes ---


def entry_of(path: str, bar: Optional[tqdm.tqdm] = None) -> dict[str, Any]:
    """Return a file's size in bytes and its SHA-256.

    Raises:
        OSError: it is no file, or cannot be read.
    """
    if not is_regular(path):
        raise OSError(f"'{path}' is no file")
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BUFFER))  # one buffer: a new one for each piece costs as much as hashing it
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
            if bar is not None:
                bar.update(count)
        return {"size": handle.tell(), "sha256": digest.hexdigest()}


def entries_of(folder: str, files: Iterable[str], title: str) -> dict[str, Optional[dict[str, Any]]]:
    """Return `entry_of` for several files, read at the same time; None for one that cannot be read.

    Args:
        folder: the files' folder.
        files: paths relative to it.
        title: label of the progress bar, which is shown for large files only.
    """
    files = list(files)
    paths = [os.path.join(folder, file) for file in files]

    def entry(path: str) -> Optional[dict[str, Any]]:
        with suppress(OSError):
            return entry_of(path, bar)
        return None

    with _bar(paths, title) as bar, ThreadPoolExecutor(cores()) as threads:
        return dict(zip(files, threads.map(entry, paths)))


def digest_of_pieces(path: str, size: int, title: str) -> str:
    """Return the SHA-256 of the concatenated SHA-256 of a file's pieces of PIECE bytes, which all cores hash together.

    Args:
        path: of the file.
        size: number of bytes, from its start, that are hashed.
        title: label of the progress bar, which is shown for a large file only.

    Raises:
        OSError: it cannot be read.
    """

    def piece(start: int) -> bytes:
        with open(path, "rb") as handle:
            handle.seek(start)
            content = handle.read(min(PIECE, size - start))
        bar.update(len(content))
        return hashlib.sha256(content).digest()

    with _bar([path], title) as bar, ThreadPoolExecutor(cores()) as threads:
        pieces = list(threads.map(piece, range(0, size, PIECE)))
    return hashlib.sha256(b"".join(pieces)).hexdigest()


def _bar(paths: Iterable[str], title: str) -> tqdm.tqdm:
    total = sum(os.path.getsize(path) for path in paths if is_regular(path))
    return tqdm.tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False, disable=None if total >= SHOWN else True)


# --- what killed processes leave behind ---


def own_name() -> str:
    """Return a name for what this process is building, by which `remove_left_behind` tells whether the process still lives."""
    return f"{socket.gethostname()}-{os.getpid()}"


def remove_left_behind(prefix: str, suffix: str) -> None:
    """Remove files and folders <prefix><own_name()><suffix> whose process, on this machine, has ended.

    A builder in another container may have the same host's name and an unknown process id; therefore it locks what it builds (try_lock).
    """
    host = glob.escape(f"{prefix}{socket.gethostname()}-")
    for path in glob.glob(f"{host}*{glob.escape(suffix)}"):
        number = path[len(prefix) + len(socket.gethostname()) + 1 : len(path) - len(suffix)]
        if number.isascii() and number.isdigit() and not _lives(int(number)):
            with suppress(OSError):
                handle = os.open(path, os.O_RDONLY)
                try:
                    if try_lock(handle):
                        remove(path)
                finally:
                    os.close(handle)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def remove(path: str) -> None:
    """Remove a file, a link or a whole folder.

    Raises:
        OSError: it does not exist or cannot be removed.
    """
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


# --- permissions and errors ---


def usual_modes(folder: str) -> None:
    """Give all files in a folder the permissions that a new file gets here. Some libraries write files that only their owner can read."""
    probe = os.path.join(folder, ".mode")
    with open(probe, "w"):
        mode = stat.S_IMODE(os.stat(probe).st_mode)
    os.remove(probe)
    for place, _, files in os.walk(folder):
        for file in files:
            os.chmod(os.path.join(place, file), mode)


def reason_of(error: BaseException) -> str:
    """Return in a few words why something could not be written: the operating system's if it is known, else the error's own."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    text = " ".join(str(error).split())
    if "unexpected pos" in text or "PytorchStreamWriter" in text:  # PyTorch does not say more
        return "not all bytes were written: the disk is full, or a quota or a limit on the size of files is reached"
    return text[:200] or type(error).__name__


def _causes(error: Optional[BaseException], seen: Optional[set[int]] = None) -> Iterator[BaseException]:
    """Yield an error and all that led to it; torch.distributed.checkpoint keeps each rank's in `failures`."""
    seen = set() if seen is None else seen
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    for failure in getattr(error, "failures", {}).values():
        yield from _causes(failure[0] if isinstance(failure, tuple) else failure, seen)
    yield from _causes(error.__cause__, seen)
    yield from _causes(error.__context__, seen)


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: torch.distributed.checkpoint wraps it like any other."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error))
