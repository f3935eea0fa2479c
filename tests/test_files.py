"""tdpo/files.py: files are replaced whole, hashed, cleaned up after killed processes, and errors of writing are named."""

import errno
import hashlib
import multiprocessing
import os
import resource
import socket
import stat

import pytest
import torch

from tdpo import files
from tdpo.files import (
    append_lines,
    digest_of_pieces,
    entries_of,
    own_name,
    reason_of,
    remove_left_behind,
    replaced_whole,
    usual_modes,
    was_interrupted,
)


def test_a_failed_replacement_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError), replaced_whole(str(tmp_path / "file")) as handle:
        handle.write("new")
        raise KeyError
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_is_under_the_temporary_name_is_in_nobodys_way(kind, tmp_path):
    """A folder of that name is not this program's, so it is kept."""
    temporary = tmp_path / "file.tmp"
    {"file": temporary.touch, "link": lambda: temporary.symlink_to("nowhere"), "folder": temporary.mkdir}[kind]()
    with replaced_whole(str(tmp_path / "file")) as handle:
        handle.write("é")
    assert (tmp_path / "file").read_bytes() == "é".encode()
    assert sorted(os.listdir(tmp_path)) == ["file", "file.tmp.old"][: 1 + (kind == "folder")]


def test_lines_are_appended_all_or_none(tmp_path):
    """A limit on the size of files stands in for a full disk."""
    path = tmp_path / "log"
    append_lines(path, [{"a": 1}, {"a": 2}])
    before = path.read_text()
    process = multiprocessing.get_context("fork").Process(target=_append_beyond_the_limit, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == errno.EFBIG and path.read_text() == before == '{"a": 1}\n{"a": 2}\n'


def _append_beyond_the_limit(path: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))
    try:
        append_lines(path, [{"a": "x" * 5}, {"a": "x" * 50}])
    except OSError as error:
        os._exit(error.errno)


@pytest.mark.parametrize("size", [0, 1, 10, 11, 25])
def test_hashes_of_pieces(size, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 10)
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content + b"rest")
    pieces = b"".join(hashlib.sha256(content[i : i + 10]).digest() for i in range(0, size, 10))
    assert digest_of_pieces(str(tmp_path / "a"), size, "") == hashlib.sha256(pieces).hexdigest()
    whole = {"size": size + 4, "sha256": hashlib.sha256(content + b"rest").hexdigest()}
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    assert entries_of(str(tmp_path), ["a", "missing", ".", "pipe"], "") == {"a": whole, "missing": None, ".": None, "pipe": None}


def test_only_what_ended_processes_left_is_removed(tmp_path):
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    host = socket.gethostname()
    kept = [f"a.{own_name()}.new", f"a.other-{ended.pid}.new", f"b.{host}-{ended.pid}.new", f"a.{host}-x.new", "a"]
    for name in [*kept, f"a.{host}-{ended.pid}.new"]:
        (tmp_path / name).mkdir()
    remove_left_behind(str(tmp_path / "a."), ".new")
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_what_is_locked_is_not_removed_even_if_its_process_is_unknown_here(tmp_path):
    """As in another container with the same host's name."""
    folder = tmp_path / f"new-{socket.gethostname()}-{2**22 + 1}"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    assert files.try_lock(handle)
    remove_left_behind(str(tmp_path / "new-"), "")
    assert folder.exists()
    os.close(handle)
    remove_left_behind(str(tmp_path / "new-"), "")
    assert not folder.exists()


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        (tmp_path / "secret").touch(mode=0o600)
        usual_modes(str(tmp_path))
    finally:
        os.umask(before)
    assert os.listdir(tmp_path) == ["secret"] and stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o640


def test_reasons_are_those_of_the_operating_system():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        try:
            raise full
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None
    except RuntimeError as error:
        assert reason_of(error) == "No space left on device"  # `from None` hides the cause only when it is printed
    failed = torch.distributed.checkpoint.api.CheckpointException("text", {0: (full, None)})
    assert reason_of(failed) == "No space left on device" and not was_interrupted(failed)
    assert "the disk is full" in reason_of(RuntimeError("[enforce fail] unexpected pos 64 vs 0"))
    assert reason_of(ValueError("a\n b")) == "a b" and reason_of(ValueError()) == "ValueError"
    assert was_interrupted(torch.distributed.checkpoint.api.CheckpointException("text", {0: (KeyboardInterrupt(), None)}))
