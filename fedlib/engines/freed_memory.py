"""Memory that a local step gives back stays with the process, so that the next step need not ask the system again.

A step's activations are some tens of megabytes, which glibc returns to the system at once and fetches anew, page by
page, a step later. That takes 2 to 20 % of a convolutional network's training, most on virtual machines.
"""

from __future__ import annotations

import contextlib
import ctypes

# glibc's <malloc.h>. The first keeps large pieces on the heap, the second keeps the heap from shrinking.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
LARGEST = 2**31 - 1


def keep() -> bool:
    """For this process, from now on: whether the C library took it. Other libraries than glibc do as they do."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such function, or no C library to open
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))
    return False
