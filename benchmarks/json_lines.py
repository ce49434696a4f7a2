"""Records as lines of JSON, appended as they are made: a rerun goes on where one stopped."""

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class DamagedError(Exception):
    """A line of a file is not a record."""


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, one dict for each line; none if there is no file.

    Raises:
        DamagedError: A line is not a record.
    """
    # What follows the last line end is a record that was being written when its process was killed.
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]

    def record(number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError:  # neither JSON nor UTF-8
            found = None
        if not isinstance(found, dict):
            raise DamagedError(
                f"{path}, line {number} is not a record: take it out, or restore the file"
            )
        return found

    return [record(number, line) for number, line in enumerate(whole, 1)]


def find(records: Iterable[dict[str, Any]], cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first record that has all items of a cell, or None."""
    return next((record for record in records if cell.items() <= record.items()), None)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, in place of one that was not written to its end; others may add to it, too."""
    path.touch()
    with path.open("r+b") as file:
        # What has no line end may be what another process is writing.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, 2)
        file.write(json.dumps(record).encode() + b"\n")
