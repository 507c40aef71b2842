"""Runs whole pipelines again with other options until the result is what was asked for."""

from onnxslim_passes.search.overrides import Override, leave_out, widen
from onnxslim_passes.search.restore import Restored, restore

__all__ = ["Override", "Restored", "leave_out", "restore", "widen"]
