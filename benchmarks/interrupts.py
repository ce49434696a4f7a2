"""Ctrl-C that arrives when a program is ready for it."""

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupt() -> Generator[Callable[[], None], None, None]:
    """Make the first Ctrl-C wait for the yielded function to be called; the second does not wait.

    JAX runs callbacks in which Python discards exceptions, so one that is raised wherever the
    signal happens to arrive can get lost.
    """
    arrived = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        # Not print, which cannot be called within itself.
        os.write(2, b"\nStopping, which may take a while; Ctrl-C again stops at once.\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check() -> None:
        if arrived:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
