"""docs/diagnostics.md: its code runs from top to bottom, and does what the text around it says."""

from __future__ import annotations

import csv
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

DOCUMENT = Path(__file__).parents[2] / "docs" / "diagnostics.md"
LAYERS = [f"Dense_{i}/{leaf}" for i in range(6) for leaf in ("bias", "kernel")]
# The last layer's bias has one entry, and is left alone.
NAMES = [f"grad_scale/{layer}" for layer in LAYERS if layer != "Dense_5/bias"]

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("document")


@pytest.fixture(scope="module")
def variables(directory: Path, compiled_quickly: None) -> dict[str, Any]:
    """What the code left behind, its files in the directory."""
    variables: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for block in blocks("python"):
            exec(block, variables)
    return variables


def test_the_csv_file_has_a_column_for_each_layer(variables: Any, directory: Path) -> None:
    with (directory / "scales.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", *NAMES]
    assert [int(row["step"]) for row in rows] == list(range(0, 100, 10))
    assert all(float(row[name]) > 0 for row in rows for name in NAMES)


def events(file: Path) -> Iterator[Event]:
    """The records of a TensorBoard file: length, checksum, an event and its checksum."""
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_has_a_curve_for_each_layer(variables: Any, directory: Path) -> None:
    (file,) = (directory / "runs").iterdir()
    steps: dict[str, list[int]] = {}
    for event in events(file):
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
            assert value.simple_value > 0
    assert steps == {name: list(range(0, 100, 10)) for name in NAMES}


def test_the_history_is_spread_over_the_whole_run(variables: Any) -> None:
    step = variables["rows"].step
    assert len(step) == 128
    assert step[0] == 0
    assert max(np.diff([*step, 500])) == 4
    assert variables["rows"].grad_scale.shape == (128, len(NAMES))
    assert np.all(variables["rows"].grad_scale > 0)


def test_a_history_taken_out_of_a_batch_is_that_of_its_seed(variables: Any) -> None:
    batch, one = variables["histories"], variables["history_of_seed_2"].in_order()
    assert batch.grad_scale.shape == (3, 128, len(NAMES))
    np.testing.assert_array_equal(one.step, variables["rows"].step)
    assert not np.array_equal(one.grad_scale, variables["rows"].grad_scale)


def test_the_picture_is_there(variables: Any, directory: Path) -> None:
    assert (directory / "scales.png").read_bytes().startswith(b"\x89PNG")
    (image,) = re.findall(r"\]\((images/.*?)\)", DOCUMENT.read_text())
    assert (DOCUMENT.parent / image).is_file()


def test_the_table_is_the_one_in_the_document(variables: Any) -> None:
    def without_numbers(table: str) -> list[list[str]]:
        rows = [re.split(r"\s{2,}", line) for line in table.splitlines()]
        return [row[:2] + row[4:] for row in rows]

    (documented,) = blocks("text")
    assert without_numbers(str(variables["table"])) == without_numbers(documented)
    assert [row.layer for row in variables["table"].rows if row.notes] == ["Dense_3/kernel"]


def test_the_part_of_a_masked_transform_and_of_nnx_is_found(variables: Any) -> None:
    rows = variables["scale_table"](variables["masked_state"], variables["only_kernels"]).rows
    assert [row.layer for row in rows] == [f"Dense_{i}/kernel" for i in range(6)]
    assert all(row.grad_scale > 0 for row in rows)
    optimizer, nnx = variables["optimizer"], variables["nnx"]
    params = nnx.state(variables["model"], nnx.Param)
    metrics = variables["scale_metrics"](optimizer.opt_state, params)
    assert list(metrics) == ["grad_scale/bias/value", "grad_scale/kernel/value"]
