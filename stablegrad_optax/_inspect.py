"""What all diagnostics read: the one state in an optimizer's state, and the names of its layers."""

import re
from typing import Any

import jax
import numpy as np

from stablegrad_optax._layers import LayerRule, Layout, layout_of
from stablegrad_optax._stablegrad import StableGradState

PyTree = Any


def find_state(opt_state: PyTree) -> StableGradState:
    """The one ``StableGradState`` in any optimizer state, with plain arrays."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_stablegrad_state)
    states = [node for node in nodes if _is_stablegrad_state(node)]
    if len(states) != 1:
        raise ValueError(
            f"opt_state has {len(states)} StableGradState in it, and needs exactly one: give the "
            "state of a chain with one stablegrad, or the part that holds it; with flax.nnx, "
            "optimizer.opt_state."
        )
    # flax.nnx.Optimizer wraps each array in a Variable.
    return StableGradState(*jax.tree.leaves(states[0]))


def state_and_layout(
    opt_state: PyTree, params: PyTree, layers: PyTree | LayerRule
) -> tuple[StableGradState, Layout]:
    """The state in ``opt_state``, and where each layer of the params is in it."""
    state = find_state(opt_state)
    layout = layout_of(layers, params)
    check_layout(layout, state.grad_scale.shape)
    return state, layout


def check_layout(layout: Layout, shape: tuple[int, ...]) -> None:
    """Raise if a vector of scales was not made for these layers."""
    if shape != (layout.num_layers,):
        raise ValueError(
            f"The scales have shape {shape}, but params and layers make {layout.num_layers} "
            "layers. Give the same layers as stablegrad got; for optax.masked or optax.partition, "
            "params with None in place of the leaves that are not its own; for a batch of states, "
            "jax.vmap(lambda s: layer_scales(s, params))."
        )


def layer_names(layout: Layout) -> list[str]:
    """Each layer's path, in a leaf of several with its indices: ``"blocks/kernel/0"``."""
    return [
        "/".join([leaf.path, *map(str, index)])
        for leaf in layout.scaled
        for index in np.ndindex(leaf.layer_shape)
    ]


def in_depth_order(names: list[str], pattern: str) -> list[int]:
    """Indices of the names with the pattern, numbers in them by size: layer 2 before layer 10."""
    matching = [index for index, name in enumerate(names) if re.search(pattern, name)]
    if names and not matching:
        raise ValueError(f"pattern {pattern!r} is in none of the layers' names: {names}.")
    # Splitting at numbers gives text and numbers in turn, so that like is compared with like.
    return sorted(
        matching,
        key=lambda index: [
            int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", names[index])
        ],
    )


def _is_stablegrad_state(node: Any) -> bool:
    return isinstance(node, StableGradState)
