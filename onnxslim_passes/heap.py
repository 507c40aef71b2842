"""Memory that was freed goes back to the operating system.

glibc keeps what a closed session held for later allocations, in holes that the next session does
not fit into: the process grows by the weights of every model that it ever opened. Other C libraries
have no such call, and macOS and Windows no need of one.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

__all__ = ["trim_heap"]


def trim_heap() -> None:
    """Gives freed memory back where the C library can (glibc: a few milliseconds)."""
    _trimmer()()


@functools.cache
def _trimmer() -> Callable[[], object]:
    if not sys.platform.startswith("linux"):
        return lambda: None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    return (lambda: None) if trim is None else functools.partial(trim, ctypes.c_size_t(0))
