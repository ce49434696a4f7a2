"""Images and their classes."""

from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class Images:
    """Images, scaled to [-0.5, 0.5] and flat, and their classes, for training and for testing.

    Attributes:
        train_inputs: float32, [n, pixels].
        train_labels: int32, [n], from 0.
        test_inputs: As ``train_inputs``, none of which is among them.
        test_labels: As ``train_labels``.
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.train_inputs.shape[1]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train_labels.max()) + 1


@cache
def digits() -> Images:
    """The 1,797 handwritten digits, 8 x 8 pixels, of scikit-learn; a quarter is for testing."""
    # Here, for the demo lists all experiments and does not install it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    inputs, labels = load_digits(return_X_y=True)
    inputs, labels = (inputs / 16 - 0.5).astype(np.float32), labels.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels
    )
    return Images(inputs[train], labels[train], inputs[test], labels[test])


DATA = {"digits": digits}
"""What can be classified, by its name."""
