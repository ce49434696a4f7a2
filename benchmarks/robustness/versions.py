"""What a record says it was made with."""

import importlib.metadata
import platform


def versions(*distributions: str) -> str:
    """The versions of Python, of this package and of the given distributions, in one line."""
    names = ("stablegrad_optax", *distributions)
    parts = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return ", ".join([f"Python {platform.python_version()}", *parts])
