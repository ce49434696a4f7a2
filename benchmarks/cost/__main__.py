"""Measure a kind of cost, line by line; what is recorded is not measured again.

tpu       bytes and passes, by the TPU compiler of the package libtpu
gpu       the same by the compiler of the GPU at hand; nothing where there is none
time      time of the optimizer's step on the CPU or GPU at hand
training  time of a whole training step of the demo's PINN there
growth    tracing and compilation, by the number of leaves
report    the tables and the picture of docs/cost.md, from the records
"""

import argparse
from pathlib import Path

import jax
from rich.progress import track

from benchmarks.cost import gpu, growth, records, report, times, tpu, training

KINDS = {"tpu": tpu, "gpu": gpu, "time": times, "training": training, "growth": growth}


def main() -> None:
    """Measure the kind that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=[*KINDS, "report"])
    parser.add_argument("--records", type=Path, default=records.RECORDS, help="folder to append to")
    options = parser.parse_args()
    if options.kind == "report":
        report.write(folder=options.records)
        return
    if options.kind == "tpu":
        jax.config.update("jax_platforms", "cpu")  # libtpu is there, a TPU need not be
    kind = KINDS[options.kind]
    cells = list(kind.cells())
    if not cells:
        print("No GPU is at hand: nothing was measured.")
        return
    for cell in track(cells, description=f"Measuring {options.kind}"):
        record = records.measured(
            options.kind, cell, lambda cell=cell: kind.measure(cell), options.records
        )
        print({k: v for k, v in record.items() if k not in ("versions", "command")}, flush=True)


if __name__ == "__main__":
    main()
