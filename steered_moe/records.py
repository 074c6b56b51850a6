"""Records of an evaluation on disk: one JSON line per example, whole batches, nothing twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steered_moe.errors import FormatError

RUN_FILE = "run.json"
RECORDS_FILE = "records.jsonl"

Record = dict[str, Any]
"""Fields of `KEYS`, ``batch``, and what was measured."""

KEYS = ("task", "language", "system", "seed", "id")


class Records:
    """The folder of one run. A killed run leaves whole batches and perhaps a torn one, which is
    cut off when the folder is opened again.

    Args:
        folder: Created if need be.
        settings: Everything that changes a result, as JSON values; a folder of other settings is
            refused.

    Raises:
        FormatError: The folder holds something else, another run, or damaged records.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._path = self.folder / RECORDS_FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim(json.loads(json.dumps(settings)))
        self._path.touch()
        rows, end = _whole_batches(self._path)
        with self._path.open("r+b") as file:
            file.truncate(end)
        self._end = end
        self.done = {(*(row[key] for key in KEYS[:-1]), row["batch"]) for row in rows}

    def _claim(self, settings: Record) -> None:
        path = self.folder / RUN_FILE
        if not path.exists():
            if self._path.exists():
                raise FormatError(f"{self.folder} has records but no {RUN_FILE}; use another one")
            text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
            half = path.with_suffix(".half")
            half.write_text(text, encoding="utf-8")
            half.replace(path)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FormatError(f"{path} is damaged: {error}; use another folder") from error
        if other := [key for key in {*found, *settings} if found.get(key) != settings.get(key)]:
            name = sorted(other)[0]
            raise FormatError(
                f"{self.folder} holds a run with {name}={found.get(name)!r:.200}, not "
                f"{settings.get(name)!r:.200}; use another folder"
            )

    def has(self, *key: Any) -> bool:
        """Whether a batch (task, language, system, seed, batch) is there."""
        return key in self.done

    def append(self, rows: Sequence[Record]) -> None:
        """Add one batch; it is on the disk when this returns."""
        lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows]
        with self._path.open("ab") as file:
            if file.tell() != self._end:
                raise FormatError(f"another process writes into {self.folder}; use another folder")
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()
        self.done.add((*(rows[0][key] for key in KEYS[:-1]), rows[0]["batch"]))

    def read(self) -> list[Record]:
        """All records, in the order in which they were made."""
        return list(_lines(self._path.read_bytes()))


def _whole_batches(path: Path) -> tuple[list[Record], int]:
    """The records of complete batches, and the byte at which the last of them ends.

    A batch says how many records it has.
    """
    data = path.read_bytes()
    rows: list[Record] = []
    batch: list[Record] = []
    end = position = 0
    for line in data.splitlines(keepends=True):
        position += len(line)
        row = _row(line)
        if row is None:
            break
        batch.append(row)
        if len(batch) == row["of"]:
            rows, batch, end = rows + batch, [], position
    if b"\n" in data[position:]:
        raise FormatError(f"{path} is damaged at byte {position}; use another folder")
    return rows, end


def _row(line: bytes) -> Record | None:
    """A record, or None for a line that was torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {*KEYS, "batch", "of"} <= set(row) else None


def _lines(data: bytes) -> Iterator[Record]:
    for line in data.splitlines():
        yield json.loads(line)
