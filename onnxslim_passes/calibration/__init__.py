"""Samples (readers of the user's data), observers (one tensor's statistics), calibration runs."""

from onnxslim_passes.calibration.observers import MinMax, Observer
from onnxslim_passes.calibration.run import TensorRange, collect_ranges
from onnxslim_passes.calibration.samples import Feed, Samples

__all__ = ["Feed", "MinMax", "Observer", "Samples", "TensorRange", "collect_ranges"]
