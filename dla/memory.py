"""Memory of the CPU."""

import ctypes

# Of glibc's `mallopt`.
TRIM_THRESHOLD, MMAP_MAX = -1, -4


def keep_memory() -> bool:
    """Keeps freed memory of the CPU in this process, as PyTorch keeps that of a GPU, until the process ends.

    glibc hands large blocks back to the system as soon as they are freed, and the next map of that size is paid for
    page by page again. What is kept is about what was in use at once.

    Returns:
        Whether this system's C library can; without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1)])
