"""The optimizers that are compared: a base optimizer and what is done to the gradient before."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from benchmarks.peers import (
    block_normalized,
    block_normalized_in_range,
    clip_in_range,
    gradient_stabilizer,
    on_each_layer,
    z_normalized,
)
from benchmarks.variants import (
    compressor,
    on_modules,
    times_weights,
    warmed_up,
    without_biases,
)
from stablegrad_optax import LayerAxes, per_leaf, stablegrad, stacked, weights_only

Stages = tuple[optax.GradientTransformationExtraArgs, optax.GradientTransformationExtraArgs]
Rate = optax.ScalarOrSchedule
Stacked = Collection[str]


def _elementwise(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    return lambda rate, stacked_keys: make(rate)


def _by_layer(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    return lambda rate, stacked_keys: on_each_layer(lambda: make(rate), stacked_keys)


def _muon(rate: Rate) -> optax.GradientTransformation:
    """Muon, to which a convolution's kernel is a matrix too: of outputs, and of all else."""

    def matrices(params: Any) -> Any:
        def axes(leaf: Any) -> MuonDimensionNumbers | None:
            others = tuple(range(leaf.ndim - 1))
            return MuonDimensionNumbers(others, len(others)) if others else None

        return jax.tree.map(axes, params)

    return optax.contrib.muon(rate, muon_weight_dimension_numbers=matrices)


BASES: dict[str, Callable[[Rate, Stacked], optax.GradientTransformation]] = {
    "adam": _elementwise(optax.adam),
    # Where gradients are near eps, Adam's step shrinks with them. This control tells what a
    # gradient scale of about 1 is worth for that reason alone.
    "adam_eps": _elementwise(partial(optax.adam, eps=1e-16)),
    "adamw": _elementwise(optax.adamw),
    "adamw_eps": _elementwise(partial(optax.adamw, eps=1e-16)),
    "sgd": _elementwise(partial(optax.sgd, momentum=0.9)),
    "lamb": _by_layer(optax.lamb),
    "novograd": _by_layer(optax.novograd),
    "muon": _by_layer(_muon),
}
"""Base optimizers, for a learning rate and the keys of stacked parameters."""


_LABELS = {
    "adam": "Adam",
    "adam_eps": "Adam, eps 1e-16",
    "adamw": "AdamW",
    "adamw_eps": "AdamW, eps 1e-16",
    "sgd": "SGD",
    "lamb": "LAMB",
    "novograd": "NovoGrad",
    "muon": "Muon",
}


def _with_rule(stacked_keys: Stacked, rule: Any, **options: Any) -> optax.GradientTransformation:
    return stablegrad(**options, layers=stacked(f"^({'|'.join(stacked_keys)})/", rule))


def _stablegrad(
    stacked_keys: Stacked, biases: bool = True, **options: Any
) -> optax.GradientTransformation:
    return _with_rule(stacked_keys, per_leaf if biases else weights_only, **options)


def _peer(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    return lambda stacked_keys, **options: on_each_layer(lambda: make(**options), stacked_keys)


def _of_modules(stacked_keys: Stacked, **options: Any) -> optax.GradientTransformation:
    return on_modules(_stablegrad(stacked_keys, **options))


def _of_weights(stacked_keys: Stacked, **options: Any) -> optax.GradientTransformation:
    return optax.chain(
        _stablegrad(stacked_keys, **options), on_each_layer(times_weights, stacked_keys)
    )


def _without_biases(stacked_keys: Stacked, **options: Any) -> optax.GradientTransformation:
    return optax.chain(
        _stablegrad(stacked_keys, **options), on_each_layer(without_biases, stacked_keys)
    )


def _per_unit(stacked_keys: Stacked, **options: Any) -> optax.GradientTransformation:
    """A statistic for each column of a kernel, the weights of a unit; biases have one for all."""

    def rule(params: Any) -> Any:
        return jax.tree.map(lambda leaf: LayerAxes(0, centered=False), params)

    return _with_rule(stacked_keys, rule, **options)


def _of_rms(stacked_keys: Stacked, **options: Any) -> optax.GradientTransformation:
    """The root mean square of kernels, too, in place of the standard deviation."""

    def rule(params: Any) -> Any:
        return jax.tree.map(lambda axes: replace(axes, centered=False), per_leaf(params))

    return _with_rule(stacked_keys, rule, **options)


def _warmed_up(stacked_keys: Stacked, warm_up: int, **options: Any) -> optax.GradientTransformation:
    return warmed_up(_stablegrad(stacked_keys, **options), warm_up)


SCALINGS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "none": lambda stacked_keys: optax.identity(),
    "stablegrad": _stablegrad,
    "clip": lambda stacked_keys: optax.clip_by_global_norm(1.0),
    "agc": _peer(partial(optax.adaptive_grad_clip, 0.01)),
    "agc_eps": _peer(partial(optax.adaptive_grad_clip, 0.01, eps=1.0)),
    "block_rms": _peer(partial(optax.clip_by_block_rms, 1.0)),
    "block_normalized": _peer(block_normalized),
    "z_normalized": _peer(z_normalized),
    "gradient_stabilizer": _peer(gradient_stabilizer),
    "compressor": compressor,
    "of_modules": _of_modules,
    "of_weights": _of_weights,
    "without_biases": _without_biases,
    "per_unit": _per_unit,
    "of_rms": _of_rms,
    "warmed_up": _warmed_up,
    "clip_in_range": lambda stacked_keys: clip_in_range(1.0),
    "block_normalized_in_range": _peer(block_normalized_in_range),
}
"""What is done to the gradient, for the keys of stacked parameters and options."""


@dataclass(frozen=True)
class Arm:
    """An optimizer in two stages: what is done to the gradient, and the base optimizer behind it.

    Attributes:
        name: What it is called on the command line and in records.
        label: What it is called in tables and pictures.
        base: The base optimizer, one of ``BASES``.
        scaling: The transform in front of it, one of ``SCALINGS``.
        options: The transform's options that the program is compiled for.
        numbers: Its options that the program takes as numbers, so that arms which differ in them
            alone share one.
        first_rate: The lowest learning rate of a sweep.
    """

    name: str
    label: str
    base: str
    scaling: str = "none"
    options: tuple[tuple[str, Any], ...] = ()
    numbers: tuple[tuple[str, float], ...] = ()
    first_rate: float = 1e-5

    @property
    def program(self) -> tuple[Any, ...]:
        """Equal for arms that differ in their learning rates and numbers alone."""
        return self.base, self.scaling, self.options, tuple(name for name, _ in self.numbers)

    def stages(
        self,
        learning_rate: Rate,
        stacked_keys: Stacked = (),
        numbers: Mapping[str, Any] | None = None,
    ) -> Stages:
        """The two stages of the optimizer, which is their ``optax.chain``."""
        given = dict(self.numbers) if numbers is None else dict(numbers)
        scaling = SCALINGS[self.scaling](stacked_keys, **dict(self.options), **given)
        base = BASES[self.base](learning_rate, stacked_keys)
        return optax.with_extra_args_support(scaling), optax.with_extra_args_support(base)


def stablegrad_arm(
    base: str,
    reference: float | str = 1.0,
    *,
    decay: float,
    balance: float,
    delayed: bool = False,
    attack: float | None = None,
    equalize: str = "std",
    biases: bool = True,
) -> Arm:
    """An arm of the grid of StableGrad's options, named by all that are not the default.

    Without ``biases`` they are left alone, as in the paper.
    """
    kind = "prediction" if reference == "prediction" else "fixed"
    name = f"stablegrad-{base}-{kind}-d{decay}-b{balance}{'-delayed' if delayed else ''}"
    shown = [f"decay {decay:g}", f"balance {balance:g}"]
    shown = ["prediction"] * (kind == "prediction") + shown + ["delayed"] * delayed
    options: dict[str, Any] = {"reference": reference, "delayed": delayed}
    numbers = {"decay": decay, "balance": balance}
    if attack is not None:
        name, shown = f"{name}-a{attack}", [*shown, f"attack {attack:g}"]
        numbers["attack"] = attack
    if equalize != "std":
        name, shown = f"{name}-{equalize}", [*shown, f"equal {equalize}s"]
        options["equalize"] = equalize
    if not biases:
        name, shown = f"{name}-weights", [*shown, "weights only"]
        options["biases"] = False
    return Arm(
        name,
        f"StableGrad ({', '.join(shown)}) + {_LABELS[base]}",
        base,
        "stablegrad",
        tuple(options.items()),
        tuple(numbers.items()),
        1e-5 if base == "sgd" and reference == "prediction" else _first_rate(base, "stablegrad"),
    )


def compressor_arm(base: str, **numbers: float) -> Arm:
    """An arm of the grid of the compressor's numbers, named by all of them."""
    follows = "balance" not in numbers
    shown = {name.replace("_", " "): value for name, value in numbers.items() if value < 1e30}
    text = ", ".join(f"{name} {value:g}" for name, value in shown.items())
    name = "-".join(f"{name[0]}{value:g}" for name, value in numbers.items())
    return Arm(
        f"compressor-{base}-{name}{'-follows' if follows else ''}",
        f"compressor, {text}{', balance follows' if follows else ''} + {_LABELS[base]}",
        base,
        "compressor",
        (("follow_imbalance", follows),),
        tuple(numbers.items()),
        _first_rate(base, "compressor"),
    )


def variant_arm(base: str, scaling: str, *, balance: float, **options: int) -> Arm:
    """An arm of an idea around the package's own rule, named by all of its options."""
    about = {
        "of_modules": "one statistic per module",
        "of_weights": "reference: RMS of the weights",
        "warmed_up": f"gains come in over {options.get('warm_up')} steps",
    }
    steps = "".join(f"-{value}" for value in options.values())
    return Arm(
        f"{scaling}-{base}-b{balance}{steps}",
        f"StableGrad (balance {balance:g}, {about[scaling]}) + {_LABELS[base]}",
        base,
        scaling,
        tuple(options.items()),
        (("balance", balance),),
        # The scale of the weights is a tenth or so.
        _first_rate(base, "stablegrad") * (10 if base == "sgd" and scaling == "of_weights" else 1),
    )


_PEERS = {
    "clip": "clip 1.0",
    "agc": "AGC 0.01",
    "block_rms": "block RMS clip 1.0",
    "block_normalized": "block-normalized",
    "z_normalized": "ZNorm",
    "gradient_stabilizer": "GradientStabilizer",
}


def _first_rate(base: str, scaling: str = "none") -> float:
    """Where a sweep of 3.5 decades starts, with the rates that did well in the screen inside.

    A step of SGD is as long as what it is given: entries of about 1, leaves of norm 1, a whole
    gradient of norm 1 at most, or the loss's own gradient.
    """
    lowest = {"stablegrad": 1e-6, "compressor": 1e-6, "z_normalized": 1e-6, "none": 1e-6}
    if base == "sgd":
        return lowest.get(scaling, 1e-3 if scaling == "clip" else 1e-4)
    return 1e-5 if base.startswith("adam") else 1e-4


def _alone(base: str) -> Arm:
    return Arm(base, _LABELS[base], base, first_rate=_first_rate(base))


def _peers_of(base: str) -> list[Arm]:
    """What may stand in front of a base optimizer in place of StableGrad."""
    return [
        Arm(
            f"{scaling}_{base}",
            f"{label} + {_LABELS[base]}",
            base,
            scaling,
            first_rate=_first_rate(base, scaling),
        )
        for scaling, label in _PEERS.items()
    ]


def changed(arm: Arm, scaling: str, about: str) -> Arm:
    """The same arm with another transform, which takes the same options."""
    label = arm.label.replace(" + ", f", {about} + ")
    return replace(arm, name=f"{scaling}-{arm.name}", label=label, scaling=scaling)


def in_range(peer: Arm) -> Arm:
    """The control of range: the same arm with a norm that does not overflow."""
    scaling = f"{peer.scaling}_in_range"
    return replace(changed(peer, scaling, "norm in range"), name=f"{scaling}_{peer.base}")


PEERS = [
    *map(_alone, ("adam", "adam_eps", "adamw", "sgd", "lamb", "novograd", "muon")),
    *_peers_of("adam"),
    *_peers_of("sgd"),
    *(arm for arm in _peers_of("muon") if arm.scaling == "clip"),
]
"""All arms without StableGrad that the PINNs are trained with."""

ADAMW_PEERS = [_alone("adamw"), _alone("adamw_eps"), *_peers_of("adamw")]
"""AdamW, and what may stand in front of it in place of StableGrad."""


def _recommended(base: str) -> Arm:
    """StableGrad as docs/pinn.md recommends it for PINNs."""
    return replace(
        stablegrad_arm(base, 1.0, decay=0.0, balance=0.5),
        name=f"stablegrad_{base}",
        label=f"StableGrad + {_LABELS[base]}",
    )


ARMS: dict[str, Arm] = {
    arm.name: arm for arm in (*PEERS, *ADAMW_PEERS, *map(_recommended, ("adam", "sgd", "muon")))
}
"""The named arms."""
