"""A network to be trained on a PDE, as the trainer of all experiments wants it."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.pinn.derivatives import Jet, along_axes, taylor
from benchmarks.pinn.networks import Network, Params
from benchmarks.pinn.problems import Problem
from stablegrad_optax import prediction_value_and_grad

BOUNDARIES = ("exact", "soft")
PREDICTIONS = ("residual", "field", "both")


@dataclass(frozen=True)
class PinnTask:
    """A PDE, a network and the points of a step.

    Attributes:
        problem: The PDE.
        network: The network that solves it.
        points: Collocation points of a step, drawn afresh for each.
        boundary: ``"exact"``: the problem's ansatz has the given values built in. ``"soft"``: the
            network is the field, and misses on the sides are part of the loss.
        prediction: What counts as the prediction, whose gradient is given to the transform:
            ``"residual"`` at each point; ``"field"``, its values and derivatives there; or
            ``"both"``. With soft boundaries their misses always belong to it.
    """

    problem: Problem
    network: Network = field(default_factory=Network)
    points: int = 256
    boundary: str = "exact"
    prediction: str = "residual"

    stacked = ("hidden",)
    """The parts of the parameters whose leaves are stacked layers."""
    unlearned = 1.0
    """The error of u = 0."""

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES or self.prediction not in PREDICTIONS:
            raise ValueError(
                f"no task has boundary {self.boundary!r} and prediction {self.prediction!r}: "
                f"choose of {BOUNDARIES} and of {PREDICTIONS}"
            )

    @property
    def solved_below(self) -> float:
        """The error under which a run counts as solved."""
        return self.problem.solved_below

    @property
    def title(self) -> str:
        """The task in a few words."""
        usual = {
            f"{self.boundary} boundary": self.boundary == "exact",
            self.network.activation: self.network.activation == "tanh",
            f"{self.network.initialization} initialization": self.network.initialization
            == "glorot",
            f"{self.prediction} prediction": self.prediction == "residual",
        }
        unusual = [text for text, is_usual in usual.items() if not is_usual]
        return ", ".join([self.problem.name, *unusual, f"depth {self.network.depth}"])

    def describe(self) -> dict[str, Any]:
        """What identifies the task in a record."""
        return {
            "problem": self.problem.name,
            "boundary": self.boundary,
            "activation": self.network.activation,
            "initialization": self.network.initialization,
            "depth": self.network.depth,
            "width": self.network.width,
            "points": self.points,
            "prediction": self.prediction,
        }

    def init(self, key: jax.Array) -> Params:
        """The network's parameters."""
        return self.network.init(key)

    def field_at(self, params: Params, points: jax.Array) -> jax.Array:
        """The field, [n], at points, [n, 2]."""
        output = self.network.apply(params, points)
        return output if self.boundary == "soft" else self.problem.ansatz(points, output)

    def gradients(self, params: Params, key: jax.Array) -> tuple[jax.Array, tuple[Params, Any]]:
        """The loss on the points of a step, and its gradients by parameters and prediction."""
        inside_key, sides_key = jax.random.split(key)
        inside = self.problem.sample(inside_key, self.points)
        sides = self.problem.sample_sides(sides_key, max(1, self.points // 4))

        def predict(params: Params) -> dict[str, Any]:
            jet = self._jet(params, inside)
            prediction: dict[str, Any] = {}
            if self.prediction == "residual":
                prediction["residual"] = self.problem.residual(inside, jet)
            else:
                prediction["field"] = jet
            if self.prediction == "both":
                # Adds nothing to the residual, and has its gradient.
                prediction["residual"] = jnp.zeros(self.points)
            if self.boundary == "soft":
                prediction["sides"] = self.network.apply(params, sides) - self.problem.given(sides)
            return prediction

        def loss(prediction: dict[str, Any]) -> jax.Array:
            residual = prediction.get("residual", 0.0)
            if "field" in prediction:
                residual += self.problem.residual(inside, prediction["field"])
            miss = jnp.mean(prediction["sides"] ** 2) if "sides" in prediction else 0.0
            return jnp.mean(residual**2) + self.problem.soft_weight * miss

        return prediction_value_and_grad(predict, loss)(params)

    def evaluate(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The relative L2 error of the field, and the field on the problem's grid."""
        grid = self.problem.grid().reshape(-1, 2)
        reference = jnp.asarray(self.problem.reference(grid), jnp.float32)
        values = self.field_at(params, jnp.asarray(grid, jnp.float32))
        error = jnp.linalg.norm(values - reference) / jnp.linalg.norm(reference)
        return error, values.reshape(self.problem.grid_shape)

    def _jet(self, params: Params, points: jax.Array) -> Jet:
        output = self.network.jet(params, points)
        if self.boundary == "soft":
            return output
        coordinates = along_axes(points)
        both = Jet(
            (coordinates.value, output.value),
            tuple(zip(coordinates.slopes, output.slopes, strict=True)),
            tuple(zip(coordinates.curvatures, output.curvatures, strict=True)),
        )
        return taylor(lambda arguments: self.problem.ansatz(*arguments), both)
