"""What a record says it was made with."""

import contextlib
import importlib.metadata
import platform


def versions(*distributions: str) -> str:
    """The versions of Python, of this package and of the given distributions, in one line."""
    names = ("stablegrad_optax", *distributions)
    parts = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return ", ".join([f"Python {platform.python_version()}", *parts])


def installed(*distributions: str) -> dict[str, str]:
    """The versions of those of the distributions that are installed, by name."""
    found = dict[str, str]()
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
