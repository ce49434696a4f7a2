"""Networks that tell images apart or continue a text, as the trainer of experiments wants them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.normfree.convnets import ConvNet
from benchmarks.normfree.data import DATA, Dataset, Images
from benchmarks.normfree.networks import DeepNetwork
from benchmarks.normfree.text import VOCABULARY, entropy, python_topics
from benchmarks.normfree.transformer import Transformer
from stablegrad_optax import prediction_value_and_grad

Params = dict[str, Any]


@dataclass(frozen=True)
class _ImageTask:
    """What the tasks of all networks have in common: images, by their name in ``DATA``."""

    data: str

    def __post_init__(self) -> None:
        if self.data not in DATA:
            raise ValueError(f"there are no images {self.data!r}: choose of {tuple(DATA)}")

    @property
    def dataset(self) -> Dataset:
        """What is known of the images without reading them."""
        return DATA[self.data]

    @property
    def images(self) -> Images:
        """The images."""
        return self.dataset.read()

    @property
    def solved_below(self) -> float:
        """The share of wrongly classified test images under which a network counts as trained."""
        return self.dataset.solved_below

    @property
    def unlearned(self) -> float:
        """The error of a guess."""
        return 1 - 1 / self.dataset.classes


@dataclass(frozen=True)
class ClassificationTask(_ImageTask):
    """Images, a fully connected network and the size of a batch.

    Attributes:
        data: Name of the images, one of ``DATA``.
        network: The network that tells them apart.
        batch: Images of a step, drawn afresh for each, with replacement.
    """

    network: DeepNetwork
    batch: int = 64

    stacked = ("hidden",)

    @property
    def title(self) -> str:
        """The task in a few words."""
        network = self.network
        start = network.initialization.replace("_", "-")
        kind = f"{network.shape} {network.activation}" + f", {start}" * (start != "lecun")
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
        return self.network.init(key, self.images.pixels, self.dataset.classes)

    def gradients(self, params: Params, key: jax.Array) -> tuple[jax.Array, tuple[Params, Any]]:
        """The cross-entropy of a batch, and its gradients by parameters and logits."""
        chosen = jax.random.randint(key, (self.batch,), 0, len(self.images.train_labels))
        inputs = jnp.asarray(self.images.train_inputs)[chosen]
        labels = jnp.asarray(self.images.train_labels)[chosen]
        return _gradients(lambda params: self.network.apply(params, inputs), labels, params)

    def evaluate(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The share of test images that are classified wrongly, and the same again to be shown.

        It is not a number where a logit is not.
        """
        logits = self.network.apply(params, jnp.asarray(self.images.test_inputs))
        error = _error(logits, self.images.test_labels)
        return error, error


@dataclass(frozen=True)
class ConvolutionTask(_ImageTask):
    """Images, a convolutional network, and how much of them a step and an evaluation take.

    The host moves and mirrors the images of a batch. The networks of a program take their steps one
    after another: each fills the processor, and side by side their convolutions would be one with
    groups, which is slow on CPUs.

    Attributes:
        data: Name of the images, one of ``DATA``.
        network: The network that tells them apart.
        batch: Images of a step.
        evaluated: Test images of an evaluation, the first of all. BatchNorm gets its statistics for
            it from as many training images, so that it has no state beside the parameters.
    """

    network: ConvNet
    batch: int = 64
    evaluated: int = 1000

    @property
    def stacked(self) -> Sequence[str]:
        """The stages' blocks after the first."""
        return self.network.stacked(self.dataset.channels, self.dataset.classes)

    @property
    def title(self) -> str:
        """The task in a few words."""
        network = self.network
        norm = " with BatchNorm" * network.batch_norm
        start = network.initialization.replace("_", "-")
        kind = f"{network.name}{norm}" + f", {start}" * (start != "lecun")
        return f"{self.data}, {kind}, width {network.width:g}"

    def describe(self) -> dict[str, Any]:
        """What identifies the task in a record; those from Flax's default start do not name it."""
        network = self.network
        named = {"initialization": network.initialization}
        return {
            "data": self.data,
            "network": network.name,
            "batch_norm": network.batch_norm,
            "width": network.width,
            "batch": self.batch,
            "evaluated": self.evaluated,
        } | (named if network.initialization != "lecun" else {})

    def init(self, key: jax.Array) -> Params:
        """The network's parameters."""
        return self.network.init(key, self.dataset.channels, self.dataset.classes)

    def batches(self, seed: int, steps: Sequence[int]) -> dict[str, Any]:
        """The batches of the given steps."""
        # Here, for the demo lists all experiments and does not install grain.
        from benchmarks.normfree.batches import batches

        return batches(self.images, self.batch, seed, steps)

    def gradients(
        self, params: Params, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, tuple[Params, Any]]:
        """The cross-entropy of a batch, and its gradients by parameters and logits."""

        @jax.custom_batching.sequential_vmap
        def of_one(params: Params, batch: dict[str, jax.Array]) -> Any:
            def predict(params: Params) -> jax.Array:
                return self.network.apply(params, batch["image"], self.dataset.classes)

            return _gradients(predict, batch["label"], params)

        return of_one(params, batch)

    def evaluate(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The share of the evaluated images that are classified wrongly, twice as above."""
        images, count = self.images, self.evaluated
        test, measured = (
            jnp.asarray(inputs[:count].reshape(-1, *images.shape))
            for inputs in (images.test_inputs, images.train_inputs)
        )

        @jax.custom_batching.sequential_vmap
        def of_one(params: Params) -> jax.Array:
            logits = self.network.apply(params, test, self.dataset.classes, measured)
            return _error(logits, images.test_labels[:count])

        error = of_one(params)
        return error, error


@dataclass(frozen=True)
class TextTask:
    """Python's reference pages, a transformer that continues them, and how much a step takes.

    Attributes:
        network: The network.
        batch: Windows of text of a step, each as long as the network's context and drawn afresh.
        evaluated: Windows of an evaluation, evenly spread over the text for testing.
    """

    network: Transformer
    batch: int = 4
    evaluated: int = 128

    stacked = ("blocks",)
    solved_below = 2.35
    """A tenth above what AdamW comes to with 12 blocks and LayerNorm: 2.25 in 2,000 steps from a
    learning rate of 3.16e-3, seed 100. It was fixed before anything without LayerNorm was tuned."""

    @property
    def unlearned(self) -> float:
        """The error of a guess that knows how frequent each character is."""
        return entropy(python_topics().train)

    @property
    def title(self) -> str:
        """The task in a few words."""
        norm = " with LayerNorm" * self.network.layer_norm
        start = self.network.initialization.replace("_", "-")
        kind = f"transformer{norm}" + f", {start}" * (start != "lecun")
        return f"text, {kind}, depth {self.network.depth}"

    def describe(self) -> dict[str, Any]:
        """What identifies the task in a record."""
        return {
            "data": "python_topics",
            "network": "transformer",
            **asdict(self.network),
            "batch": self.batch,
            "evaluated": self.evaluated,
        }

    def init(self, key: jax.Array) -> Params:
        """The network's parameters."""
        return self.network.init(key, VOCABULARY)

    def gradients(self, params: Params, key: jax.Array) -> tuple[jax.Array, tuple[Params, Any]]:
        """The cross-entropy of a batch, and its gradients by parameters and logits."""
        text = python_topics().train
        starts = jax.random.randint(key, (self.batch,), 0, len(text) - self.network.context)
        inputs, labels = self._windows(text, starts)
        return _gradients(lambda params: self.network.apply(params, inputs), labels, params)

    def evaluate(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The mean cross-entropy of test windows, in nats per character, twice as above.

        It is not a number where a logit is not.
        """
        text = python_topics().test
        starts = np.linspace(0, len(text) - self.network.context - 1, self.evaluated).astype(int)
        inputs, labels = self._windows(text, jnp.asarray(starts))
        logits = self.network.apply(params, inputs)
        error = jnp.where(jnp.all(jnp.isfinite(logits)), _cross_entropy(logits, labels), jnp.nan)
        return error, error

    def _windows(self, text: np.ndarray, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The characters from each start on, [n, context], and those that follow each of them."""
        places = starts[:, None] + jnp.arange(self.network.context + 1)
        windows = jnp.asarray(text)[places].astype(jnp.int32)
        return windows[:, :-1], windows[:, 1:]


def _gradients(
    predict: Callable[[Params], jax.Array], labels: jax.Array, params: Params
) -> tuple[jax.Array, tuple[Params, Any]]:
    """The cross-entropy of the logits, and its gradients by parameters and logits."""
    return prediction_value_and_grad(predict, lambda logits: _cross_entropy(logits, labels))(params)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _error(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """The share of wrong classes; not a number where a logit is not."""
    wrong = jnp.mean(jnp.argmax(logits, axis=1) != jnp.asarray(labels))
    return jnp.where(jnp.all(jnp.isfinite(logits)), wrong, jnp.nan)
