"""What the compiled optimizer step moves: bytes, passes over the gradients, all-reduces, memory.

``bytes accessed`` is the compiler's own static count, and counts a branch that runs in the first
step alone like all else. So delayed arms are compiled twice, the second time without that branch:
what the steps after the first one move. The passes are counted in the entry computation, which is
what every step runs: the operations that read a gradient there.

A TPU's compiler moves arrays that fit there to the chip's own memory ahead of their use, and its
count has each of them up to five times then: they are read, written, named by the copy and read
again. So the bytes that go to and from HBM, which is what limits an optimizer step, are counted
apart.
"""

import math
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cost.arms import arm, step_of
from benchmarks.cost.transformer import loss_of, parameters_and_batch
from benchmarks.tpu_compiler import entry_of

PyTree = Any

LEAVES, SHAPE = 4, (4096, 4096)


def cell_of(
    chip: str, devices: int, base: str, front: str, grads: str = "float32"
) -> dict[str, Any]:
    """An arm's optimizer step on so many chips, with gradients of that dtype."""
    return {"chip": chip, "devices": devices, "base": base, "arm": front, "grads": grads}


def measure(cell: dict[str, Any], devices: np.ndarray) -> dict[str, Any]:
    """Compile one cell for the devices and count; the bytes of later steps apart."""
    counted = _measure(cell, devices)
    later = counted
    if "delayed" in cell["arm"]:
        with mock.patch("stablegrad_optax._stablegrad.known", lambda before, after, take: before):
            later = _measure(cell, devices)
    return counted | {"later_bytes": later["bytes"], "later_hbm_bytes": later["hbm_bytes"]}


def _measure(cell: dict[str, Any], devices: np.ndarray) -> dict[str, Any]:
    mesh = jax.sharding.Mesh(devices, ("x",))

    def spec(tree: PyTree, shard: bool = True) -> PyTree:
        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            is_large = shard and leaf.ndim == 2 and leaf.shape[0] % mesh.size == 0
            axes = jax.sharding.PartitionSpec(*["x"] * is_large)
            return jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, axes)
            )

        return jax.tree.map(one, tree)

    tx = arm(cell["arm"], cell["base"])
    if cell.get("program") == "transformer":
        params, batch = parameters_and_batch()

        def train(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            return step_of(tx)(params, state, jax.grad(loss_of)(params, batch))

        function, last = train, spec(batch, shard=False)
    else:
        params = {f"kernel_{i}": jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(LEAVES)}
        grads = {
            name: jax.ShapeDtypeStruct(leaf.shape, cell["grads"]) for name, leaf in params.items()
        }
        function, last = step_of(tx), spec(grads)
    state = jax.eval_shape(tx.init, params)
    lowered = jax.jit(function, donate_argnums=(0, 1)).lower(spec(params), spec(state), last)
    compiled = lowered.compile()
    text = compiled.as_text() or ""
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    counted = {
        "bytes": costs["bytes accessed"],
        "hbm_bytes": hbm_bytes(text),
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        **all_reduces(text),
    }
    if "program" in cell:
        counted["sums_on_matmuls"] = sums_on_matmuls(text)
    else:
        counted["passes"] = passes(text, num_gradients=LEAVES)
    return counted


def passes(text: str, num_gradients: int) -> int:
    """The most operations of the entry computation that read the same gradient.

    The gradients are the last parameters. Tuples, such as the operands of a branch, read nothing.
    """
    entry = entry_of(text)
    names = {
        int(number): name for name, number in re.findall(r"%(\S+) = \S+ parameter\((\d+)\)", entry)
    }
    gradients = [names[number] for number in sorted(names)[-num_gradients:]]
    operations = re.findall(r"%\S+ = .*? ([\w-]+)\((.*?)\)", entry)
    readers = [
        sum(
            operation not in ("tuple", "conditional", "bitcast")
            and gradient in re.findall(r"%([\w.\-]+)", operands)
            for operation, operands in operations
        )
        for gradient in gradients
    ]
    return max(readers)


BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def hbm_bytes(text: str) -> int:
    """Bytes that the operations of the entry computation read from HBM and write to it.

    Operands and results are counted whole, as the compiler's own count does, but for those in the
    chip's own memories, ``S(1)`` and the like in their layouts. Of the branches of a conditional
    the one with most traffic counts.
    """
    return _hbm_bytes(text, entry_of(text))


def _hbm_bytes(text: str, computation: str) -> int:
    in_hbm: dict[str, int] = {}
    total = 0
    operations = r"%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)"
    for name, result, operation, operands, rest in re.findall(operations, computation):
        arrays = [
            (BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n), "S(" not in layout)
            for dtype, shape, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", result)
            if dtype in BYTES
        ]
        in_hbm[name] = sum(size for size, is_in_hbm in arrays if is_in_hbm)
        if operation in NO_TRAFFIC or operation.endswith("-done"):
            continue
        if operation == "conditional":
            branches = re.findall(r"%([\w.\-]+)", rest.partition("computation")[2].split("}")[0])
            total += max(_hbm_bytes(text, _body(text, branch)) for branch in branches)
        elif operation in ("copy-start", "slice-start"):
            # The result names both ends, of which a slice is the smaller one.
            (one, is_in_hbm), (other, other_is_in_hbm), *_ = arrays
            total += min(one, other) * (is_in_hbm + other_is_in_hbm)
        else:
            total += in_hbm[name]
            total += sum(in_hbm.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))
    return total


def _body(text: str, name: str) -> str:
    return text[text.index(f"\n%{name} ") + 1 :].partition("\n}")[0].partition("\n")[2]


def sums_on_matmuls(text: str) -> int:
    """The operations of the entry computation that are a matrix product and its sums in one."""
    named = re.findall(r"= \((?:f32\[\]\S* )+.* fusion\(.*calls=%([\w.\-]+)", entry_of(text))
    return sum(" convolution(" in _body(text, name) for name in named)


def all_reduces(text: str) -> dict[str, int]:
    """Of every step: how many there are, and how many numbers they carry."""
    found = re.findall(r"= (.*?) all-reduce(?:-start)?\(", entry_of(text))
    floats = sum(
        int(np.prod([int(n) for n in shape.split(",") if n] or [1]))
        for result in found
        for shape in re.findall(r"\w+\[([\d,]*)\]", result)
    )
    return {"all_reduces": len(found), "all_reduced_numbers": floats}
