"""Git LFS pointers: the small text files that a clone without ``git lfs pull`` has in place of large ones."""

_FIRST_LINE = b"version https://git-lfs"  # of every version of the format


def is_lfs_pointer(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a Git LFS pointer."""
    return start.startswith(_FIRST_LINE)
