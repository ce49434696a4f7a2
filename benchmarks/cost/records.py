"""Measurements as lines of JSON: appended as they finish, and not measured twice."""

import importlib.metadata
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parents[1] / "records"
PACKAGES = ("jax", "jaxlib", "optax", "flax", "libtpu")


def read(kind: str, folder: Path = RECORDS) -> list[dict[str, Any]]:
    """The measurements of a kind, such as "tpu", one dict each."""
    path = folder / f"cost_{kind}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def measured(
    kind: str,
    cell: Mapping[str, Any],
    measure: Callable[[], Mapping[str, Any]],
    folder: Path = RECORDS,
) -> dict[str, Any]:
    """The record of a cell, measured and appended if there is none yet."""
    for record in read(kind, folder):
        if cell.items() <= record.items():
            return record
    record = {**cell, **measure(), "versions": versions(), "command": command()}
    folder.mkdir(exist_ok=True)
    with (folder / f"cost_{kind}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def versions() -> dict[str, str]:
    """Of the packages that decide what is compiled, those that are installed."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in PACKAGES if name in found}


def command() -> str:
    """The command that is running."""
    return shlex.join(["python", "-m", "benchmarks.cost", *sys.argv[1:]])
