"""Batches of images, shifted and mirrored at random, made on the host by grain."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from benchmarks.normfree.data import Images

Example = dict[str, Any]


def batches(images: Images, size: int, seed: int, steps: Sequence[int]) -> Example:
    """The batches of the given steps: ``image`` [steps, size, height, width, channels], ``label``.

    Each epoch has every image once, in an order of its own. A seed and a step fix a batch, whatever
    was asked for before.
    """

    def augmented(index: int, rng: np.random.Generator) -> Example:
        image = images.train_inputs[index].reshape(images.shape)
        return {"image": moved(image, rng, images.flips), "label": images.train_labels[index]}

    indices = grain.MapDataset.range(len(images.train_labels)).seed(seed)
    dataset: Any = indices.shuffle().repeat().random_map(augmented).batch(size)
    made = [dataset[int(step)] for step in steps]
    return {name: np.stack([batch[name] for batch in made]) for name in ("image", "label")}


def moved(image: np.ndarray, rng: np.random.Generator, flips: bool) -> np.ndarray:
    """An image moved by up to an eighth of its height, and mirrored or not if it may be.

    That is the usual augmentation of CIFAR, of 4 pixels in 32. What comes in is black.
    """
    height, width, _ = image.shape
    margin = height // 8
    sides = ((margin, margin), (margin, margin), (0, 0))
    padded = np.pad(image, sides, constant_values=-0.5)
    row, column = rng.integers(0, 2 * margin, 2, endpoint=True)
    image = padded[row : row + height, column : column + width]
    return image[:, ::-1] if flips and rng.integers(2) else image
