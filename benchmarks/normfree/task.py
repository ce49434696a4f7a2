"""A network to be trained to tell images apart, as the trainer of all experiments wants it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.normfree.data import DATA, Images
from benchmarks.normfree.networks import DeepNetwork, Params
from stablegrad_optax import prediction_value_and_grad


@dataclass(frozen=True)
class ClassificationTask:
    """Images, a network and the size of a batch.

    Attributes:
        data: Name of the images, one of ``DATA``.
        network: The network that tells them apart.
        batch: Images of a step, drawn afresh for each, with replacement.
    """

    data: str
    network: DeepNetwork
    batch: int = 64

    stacked = ("hidden",)
    solved_below = 0.1
    """Nine of ten test images are classified correctly."""

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise ValueError(f"there are no images {self.data!r}: choose of {tuple(DATA)}")

    @property
    def images(self) -> Images:
        """The images."""
        return DATA[self.data]()

    @property
    def unlearned(self) -> float:
        """The error of a guess."""
        return 1 - 1 / self.images.classes

    @property
    def title(self) -> str:
        """The task in a few words."""
        network = self.network
        aware = ", activation-aware" * (network.initialization == "activation_aware")
        kind = f"{network.shape} {network.activation}{aware}"
        return f"{self.data}, {kind}, depth {network.depth}"

    def describe(self) -> dict[str, Any]:
        """What identifies the task in a record."""
        return {
            "data": self.data,
            "shape": self.network.shape,
            "activation": self.network.activation,
            "initialization": self.network.initialization,
            "depth": self.network.depth,
            "width": self.network.width,
            "batch": self.batch,
        }

    def init(self, key: jax.Array) -> Params:
        """The network's parameters."""
        return self.network.init(key, self.images.pixels, self.images.classes)

    def gradients(self, params: Params, key: jax.Array) -> tuple[jax.Array, tuple[Params, Any]]:
        """The cross-entropy of a batch, and its gradients by parameters and logits."""
        chosen = jax.random.randint(key, (self.batch,), 0, len(self.images.train_labels))
        inputs = jnp.asarray(self.images.train_inputs)[chosen]
        labels = jnp.asarray(self.images.train_labels)[chosen]

        def loss(logits: jax.Array) -> jax.Array:
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        return prediction_value_and_grad(lambda params: self.network.apply(params, inputs), loss)(
            params
        )

    def evaluate(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The share of test images that are classified wrongly, and the same again to be shown.

        It is not a number where a logit is not.
        """
        logits = self.network.apply(params, jnp.asarray(self.images.test_inputs))
        wrong = jnp.mean(jnp.argmax(logits, axis=1) != jnp.asarray(self.images.test_labels))
        error = jnp.where(jnp.all(jnp.isfinite(logits)), wrong, jnp.nan)
        return error, error
