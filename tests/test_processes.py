"""Garbage collection while packages are imported."""

import gc
from contextlib import suppress

import pytest

from tinygptv_ds.processes import without_garbage_collection


@pytest.mark.parametrize("enabled", [True, False])
def test_without_garbage_collection(enabled: bool) -> None:
    """It is as it was afterwards, whatever happens, and what was made is out of its sight."""
    frozen = gc.get_freeze_count()
    try:
        gc.enable() if enabled else gc.disable()
        with suppress(ZeroDivisionError), without_garbage_collection():
            assert not gc.isenabled()
            made = [[] for _ in range(1000)]
            raise ZeroDivisionError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert gc.get_freeze_count() >= frozen + len(made)
