"""Text that every Python has: the reference pages that ``help()`` shows.

They differ a little from one version of Python to the next; records name theirs.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

VOCABULARY = 128
"""Characters there may be: those of ASCII."""


class Text(NamedTuple):
    """Characters by their ASCII codes, uint8.

    Attributes:
        train: The first nine tenths.
        test: The last tenth.
    """

    train: np.ndarray
    test: np.ndarray


@cache
def python_topics() -> Text:
    """All topics in alphabetical order, as ASCII; what is not ASCII is a question mark.

    Topics share paragraphs. Each is kept once, so that none is both for training and for testing.
    """
    # Here, for the demo lists all experiments and does not need it.
    from pydoc_data.topics import topics

    paragraphs = (part for name in sorted(topics) for part in topics[name].split("\n\n"))
    different = dict.fromkeys(paragraph.strip("\n") for paragraph in paragraphs)
    text = "\n\n".join(different).encode("ascii", "replace")
    characters = np.frombuffer(text, np.uint8)
    train, test = np.split(characters, [len(characters) * 9 // 10])
    return Text(train, test)


def entropy(characters: np.ndarray) -> float:
    """The entropy of the characters' frequencies, in nats."""
    frequencies = np.bincount(characters) / len(characters)
    frequencies = frequencies[frequencies > 0]
    return float(-np.sum(frequencies * np.log(frequencies)))
