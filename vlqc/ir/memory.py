"""Returns freed memory of this process to the operating system."""

import ctypes


def release_unused_memory() -> None:
    """Makes glibc return freed heap memory to the system; elsewhere does nothing.

    The temporaries of a stage have many sizes, so that the allocator keeps far more than it reuses.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
