"""What the transform adds to a training step on a TPU pod, by XLA's TPU compiler; no TPU is needed.

The job is that of ``examples/tpu_pod.py``: a scanned transformer under FSDP x tensor parallel. Its
whole training step is compiled for every chip of a topology, with AdamW alone and with the
transform in front, and the program of one chip is counted. It takes minutes for each front; run it
by hand, in the environment that ``make test-tpu`` makes::

    JAX_PLATFORMS=cpu .venv-tpu/bin/python -m benchmarks.cost.pod
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.cost.programs import all_reduces, hbm_bytes
from benchmarks.tpu_compiler import devices
from benchmarks.versions import versions
from examples.tpu_pod import LARGE, RULES, Config, job, mesh_of
from stablegrad_optax import stablegrad, stacked

PyTree = Any

RECORD = Path(__file__).parents[2] / "docs" / "records" / "tpu_pod.txt"

LAYERS = stacked("^blocks/")
FRONTS: dict[str, optax.GradientTransformation] = {
    "alone": optax.identity(),
    "stablegrad, delayed": stablegrad(decay=0.9, delayed=True, layers=LAYERS),
    "stablegrad": stablegrad(layers=LAYERS),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
}
"""What stands in front of ``optax.adamw``."""

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def measure(front: str, config: Config, topology: str, tensor: int) -> dict[str, int]:
    """Compile the training step for all chips of a topology, and count in the program of a chip.

    ``all_reduces`` and ``all_reduced_numbers`` are those outside of the loops. The kinds of
    collectives are counted in the whole text: those of the loop over the blocks, and of the branch
    that only the first step takes with ``delayed=True``, are in it.
    """
    mesh = mesh_of(devices(topology), tensor)
    tx = optax.chain(FRONTS[front], optax.adamw(1e-3))
    init, step, shardings, batch = job(config, tx, mesh)
    shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    state = jax.tree.map(_placed, shapes, shardings)
    tokens = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32, sharding=batch)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        compiled = jitted.lower(state, tokens).compile()
    text = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    return {
        **all_reduces(text),
        "hbm_bytes": hbm_bytes(text),
        "temporary_bytes": memory.temp_size_in_bytes,
        **{kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in COLLECTIVES},
    }


def _placed(leaf: Any, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def row(front: str, counted: dict[str, int]) -> str:
    """One front's counts, for people."""
    others = ", ".join(f"{counted[kind]} {kind}" for kind in COLLECTIVES)
    return (
        f"{front}: {counted['all_reduces']} all-reduces of {counted['all_reduced_numbers']} "
        f"numbers outside of the loops,\n"
        f"    {counted['hbm_bytes'] / 2**30:.3f} GiB from and to HBM there, "
        f"{counted['temporary_bytes'] / 2**30:.3f} GiB temporary;\n"
        f"    in the whole program {others}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile for each front that the command line asks for, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost.pod", description=__doc__)
    parser.add_argument("--topology", default="v5p:8x8x4", help="256 chips, unless told otherwise")
    parser.add_argument("--tensor", type=int, default=4, help="chips along the tensor axis")
    parser.add_argument("--fronts", nargs="+", choices=FRONTS, default=list(FRONTS))
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record goes")
    given = parser.parse_args(arguments)
    said = [
        f"python -m benchmarks.cost.pod --topology {given.topology} --tensor {given.tensor}",
        versions("jax", "libtpu", "optax", "flax"),
        "",
        f"The training step of examples/tpu_pod.py, {LARGE},",
        "float32 parameters, bfloat16 activations, optax.adamw; by the TPU's compiler.",
    ]
    print("\n".join(said), flush=True)
    for front in given.fronts:
        counted = measure(front, LARGE, given.topology, given.tensor)
        said += ["", row(front, counted)]
        print(*said[-2:], sep="\n", flush=True)
        given.record.write_text("\n".join(said) + "\n")


if __name__ == "__main__":
    main()
