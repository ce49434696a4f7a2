"""Records as lines of JSON, appended as they are made: a rerun goes on where one stopped."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, one dict for each line; none if there is no file."""
    # What follows the last line end is a record that was being written when its process was killed.
    whole, _, _ = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
    return [json.loads(line) for line in whole.splitlines()]


def find(records: Iterable[dict[str, Any]], cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first record that has all items of a cell, or None."""
    return next((record for record in records if cell.items() <= record.items()), None)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, in place of one that was not written to its end."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, 2)
        file.write(json.dumps(record).encode() + b"\n")
