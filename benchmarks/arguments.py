"""Values of command lines that are errors out of their range."""

import argparse
from collections.abc import Callable


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """A type for ``add_argument``: whole numbers from the lowest to the highest."""

    def convert(text: str) -> int:
        if not (text.isdecimal() and lowest <= int(text) <= highest):
            raise argparse.ArgumentTypeError(
                f"invalid value: {text!r} (choose a whole number from {lowest} to {highest})"
            )
        return int(text)

    return convert
