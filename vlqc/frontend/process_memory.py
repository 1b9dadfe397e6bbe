"""The memory of this process: how much it took, and giving back what it does not need."""

import ctypes
import resource
import sys


def peak_memory() -> int:
    """The most memory this process ever held, in bytes; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_memory() -> None:
    """Has the C library return what it keeps for later, where it can: temporaries of a stage are of all sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
