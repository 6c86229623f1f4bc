"""What the process takes from the machine: CPU time, and memory that it keeps."""

from __future__ import annotations

import ctypes
import platform
import resource

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT_BYTES, _BLOCK_BYTES = 2**30, 2**25  # the second is glibc's upper limit


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory does not suffice, on a GPU or on a CPU; told without torch."""
    known = ("out of memory", "not enough memory", "can't allocate memory")
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or any(text in str(error).lower() for text in known)


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error) or type(error).__name__).splitlines()[0]


def keep_freed_memory() -> bool:
    """Let glibc hand the free end of its heap back to the system from 1 GiB on only, and take larger blocks from it.

    Every step of training frees what the next one asks for. By default glibc may return it each time, depending on what
    was freed before: then thousands of pages are cleared anew in each step.

    Returns:
        Whether the C library was told; False for any other than glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = ((_MMAP_THRESHOLD, _BLOCK_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES))
    return all(library.mallopt(name, value) == 1 for name, value in settings)
