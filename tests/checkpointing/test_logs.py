"""tdpo/checkpointing/logs.py: logs are read whatever they hold, and cut back without losing what others have written."""

import json
import os
import random
from pathlib import Path

import pytest

from tdpo.checkpointing.logs import cut_back, read_metrics
from tdpo.utils import UserError

ENTRIES = [
    {"split": split, "counters/examples": examples, f"loss/{split}": None if examples == 16 else 0.5}
    for examples in (0, 8, 16, 24)
    for split in ("eval", "train")
]
GARBAGE = [
    b"\xff\xfe\x00\n",
    b"null\n",
    b"[]\n",
    b"3\n",
    b"{}\n",
    b'{"counters/examples": "8"}\n',
    b'{"counters/examples": true}\n',
    b"[" * 9999,
]
GARBAGE += [b'{"split": "train", "counters/exa\n', b"\x00" * 50 + b"\n", b"Traceback\n", b'{"counters/examples": null, "split": "train"}\n']

GARBAGE.insert(0, b'{"split": "train", "counters/examples": 1' + b"0" * 400 + b"}\n")


def written(path, lines: list[bytes]) -> str:
    path.write_bytes(b"".join(lines))
    return str(path)


def content(path: str) -> bytes:
    return Path(path).read_bytes()


@pytest.fixture
def lines() -> list[bytes]:
    return [json.dumps(entry).encode() + b"\n" for entry in ENTRIES]


def test_what_is_no_entry_is_left_out_and_counted(lines, tmp_path):
    others = [b'{"split": "test", "counters/examples": 8}\n', b'{"split": [1], "counters/examples": 8}\n']
    foreign = [*(line.rstrip(b"\n") + b"\n" for line in GARBAGE), *others]
    mixed = [*lines, *foreign, b"\n"]  # an empty line is none
    random.Random(0).shuffle(mixed)
    found, unreadable = read_metrics(written(tmp_path / "log", mixed))
    assert sorted(map(str, found)) == sorted(map(str, ENTRIES)) and unreadable == len(foreign)


def test_values_that_are_no_numbers_are_no_metrics(tmp_path):
    values = b'"loss/eval": "x", "a": {}, "b": true, "c": null, "d": 1, "e": 1' + b"0" * 400
    line = b'{"split": "eval", "counters/examples": 8, ' + values + b"}\n"
    assert read_metrics(written(tmp_path / "log", [line])) == ([{"split": "eval", "counters/examples": 8, "c": None, "d": 1}], 0)


@pytest.mark.parametrize("evaluated", [False, True])
def test_entries_that_will_be_repeated_are_removed(evaluated, lines, tmp_path, capsys):
    path = written(tmp_path / "log", [*lines, lines[-1][:20]])
    cut_back(path, 16, evaluated)
    kept = [json.loads(line) for line in content(path).splitlines()]
    assert kept == ENTRIES[:4] + (ENTRIES[4:6] if evaluated else ENTRIES[5:6])
    assert os.listdir(tmp_path) == ["log"] and capsys.readouterr().out == ""


def test_a_whole_entry_without_its_end_of_line_counts(lines, tmp_path):
    path = written(tmp_path / "log", [*lines[:3], lines[3].rstrip(b"\n")])
    cut_back(path, 8, True)
    assert content(path) == b"".join(lines[:4])


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_a_log_with_lines_that_cannot_be_read_is_kept_aside(garbage, lines, tmp_path, capsys):
    path = written(tmp_path / "log", [lines[0], garbage + b"\n", *lines[1:]])
    before = content(path)
    cut_back(path, 99, True)
    assert content(path) == b"".join(lines) and content(path + ".old") == before
    assert "1 line cannot be read; the file is kept as log.old" in capsys.readouterr().out


def test_a_process_that_is_killed_while_it_cuts_a_log_back_loses_nothing(lines, tmp_path, monkeypatch):
    path = written(tmp_path / "log", [lines[0], b"null\n", *lines[1:]])
    before = content(path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tdpo.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cut_back(path, 99, True)
    assert content(path) == content(path + ".old") == before


def test_a_log_that_is_no_file_is_named(tmp_path):
    (tmp_path / "log").mkdir()
    for read in (lambda: cut_back(str(tmp_path / "log"), 8, True), lambda: read_metrics(str(tmp_path / "log"))):
        with pytest.raises(UserError, match=f"'{tmp_path}/log' cannot be read: Is a directory"):
            read()
    cut_back(str(tmp_path / "missing"), 8, True)
