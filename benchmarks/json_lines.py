"""Records as lines of JSON, appended as they are made: a rerun goes on where one stopped."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, one dict for each line; none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def find(path: Path, cell: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first record that has all items of a cell, or None."""
    return next((record for record in read(path) if cell.items() <= record.items()), None)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
