"""Where each kind of cost is recorded; what is there is not measured again."""

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import json_lines
from benchmarks.versions import installed

RECORDS = Path(__file__).parents[1] / "records"


def read(kind: str, folder: Path = RECORDS) -> list[dict[str, Any]]:
    """The measurements of a kind, such as "tpu", one dict each."""
    return json_lines.read(_path(kind, folder))


def measured(
    kind: str,
    cell: Mapping[str, Any],
    measure: Callable[[], Mapping[str, Any]],
    folder: Path = RECORDS,
) -> dict[str, Any]:
    """The record of a cell, measured and appended if there is none yet."""
    path = _path(kind, folder)
    record = json_lines.find(json_lines.read(path), cell)
    if record is None:
        made_with = {
            "versions": installed("jax", "jaxlib", "optax", "flax", "libtpu"),
            "command": shlex.join(["python", "-m", "benchmarks.cost", *sys.argv[1:]]),
        }
        record = {**cell, **measure(), **made_with}
        folder.mkdir(exist_ok=True)
        json_lines.append(path, record)
    return record


def _path(kind: str, folder: Path) -> Path:
    return folder / f"cost_{kind}.jsonl"
