"""Records of a run on disk: torn batches are cut off, other runs refused, nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steered_moe.errors import FormatError
from steered_moe.records import RECORDS_FILE, RUN_FILE, Records

SETTINGS = {"tasks": ["t"], "limit": None}


def batch(number: int, count: int = 3, language: str = "bn") -> list[dict]:
    label = {"task": "t", "language": language, "system": "base", "seed": 0, "batch": number}
    return [{**label, "id": f"{number}-{i}", "of": count, "answer": "৪২\n\u2028"}
            for i in range(count)]  # fmt: skip


def written(folder: Path, batches: int = 4) -> bytes:
    records = Records(folder, SETTINGS)
    for number in range(batches):
        records.append(batch(number))
    return (folder / RECORDS_FILE).read_bytes()


def test_what_is_written_is_read(tmp_path: Path):
    written(tmp_path)
    records = Records(tmp_path, SETTINGS)
    assert records.read() == [row for number in range(4) for row in batch(number)]
    assert records.has("t", "bn", "base", 0, 3)
    assert not records.has("t", "bn", "base", 0, 4)
    assert not records.has("t", "sw", "base", 0, 3)


def test_a_file_cut_at_any_byte_goes_on_to_the_same_file(tmp_path: Path):
    whole = written(tmp_path / "whole")
    for cut in range(0, len(whole), 7):
        folder = tmp_path / str(cut)
        written(folder, 0)
        (folder / RECORDS_FILE).write_bytes(whole[:cut])
        records = Records(folder, SETTINGS)
        done = [n for n in range(4) if records.has("t", "bn", "base", 0, n)]
        assert done == list(range(len(done)))  # whole batches from the first one on
        for number in range(len(done), 4):
            records.append(batch(number))
        assert (folder / RECORDS_FILE).read_bytes() == whole


def test_without_the_cut_a_torn_batch_would_stay(tmp_path: Path):
    whole = written(tmp_path)
    torn = whole[: len(whole) - 20]
    (tmp_path / RECORDS_FILE).write_bytes(torn)
    assert len(torn.splitlines()) == 12
    assert len(Records(tmp_path, SETTINGS).read()) == 9


def test_damage_in_the_middle_is_refused(tmp_path: Path):
    whole = written(tmp_path)
    middle = whole.replace(b'"2-1"', b'"2-1')
    (tmp_path / RECORDS_FILE).write_bytes(middle)
    with pytest.raises(FormatError, match="damaged at byte"):
        Records(tmp_path, SETTINGS)


def test_another_run_is_refused_with_what_differs(tmp_path: Path):
    written(tmp_path)
    with pytest.raises(FormatError, match="limit=None, not 5"):
        Records(tmp_path, {**SETTINGS, "limit": 5})
    with pytest.raises(FormatError, match="dtype"):
        Records(tmp_path, {**SETTINGS, "dtype": "float32"})
    Records(tmp_path, SETTINGS)
    (tmp_path / RUN_FILE).unlink()
    with pytest.raises(FormatError, match=RUN_FILE):
        Records(tmp_path, SETTINGS)


def test_settings_are_kept_as_they_are_given(tmp_path: Path):
    Records(tmp_path, {"a": ("x", 1.5)})
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {"a": ["x", 1.5]}
    Records(tmp_path, {"a": ["x", 1.5]})


def test_two_writers_of_one_folder_are_refused(tmp_path: Path):
    first, second = Records(tmp_path, SETTINGS), Records(tmp_path, SETTINGS)
    first.append(batch(0))
    with pytest.raises(FormatError, match="another process writes into"):
        second.append(batch(0))
    first.append(batch(1))
    assert len(first.read()) == 6


def test_a_damaged_description_is_refused(tmp_path: Path):
    written(tmp_path)
    (tmp_path / RUN_FILE).write_text("")
    with pytest.raises(FormatError, match="is damaged"):
        Records(tmp_path, SETTINGS)
