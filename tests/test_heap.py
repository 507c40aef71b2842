"""Freed memory goes back to the operating system where the C library keeps it."""

import os
import sys
from pathlib import Path

import pytest

from onnxslim_passes import heap
from onnxslim_passes.heap import trim_heap

BLOCK, COUNT = 64 << 10, 512  # 32 MB in pieces that glibc does not map one by one


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_holes_in_the_heap_are_given_back() -> None:
    pytest.importorskip("ctypes").CDLL(None).gnu_get_libc_version  # noqa: B018
    blocks = [bytearray(os.urandom(8) * (BLOCK // 8)) for _ in range(COUNT)]
    last = bytearray(BLOCK)  # without it free() alone would shorten the heap
    before = resident()
    del blocks
    trim_heap()
    assert resident() < before - BLOCK * COUNT // 2
    assert last == bytes(BLOCK)


def test_other_systems_have_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(heap.ctypes, "CDLL", loaded.append)
    heap._trimmer.cache_clear()
    try:
        trim_heap()
    finally:
        heap._trimmer.cache_clear()
    assert not loaded
