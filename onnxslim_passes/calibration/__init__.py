"""Samples (readers of the user's data), observers (one tensor's range), calibration runs."""

from onnxslim_passes.calibration.cache import RangeCache
from onnxslim_passes.calibration.observers import OBSERVERS, MinMax, Observer, ObserverOptions
from onnxslim_passes.calibration.ranges import TensorRange
from onnxslim_passes.calibration.run import collect_ranges
from onnxslim_passes.calibration.samples import Feed, Samples
from onnxslim_passes.calibration.segments import stream_values, visit_values
from onnxslim_passes.calibration.statistics import ChannelStatistics, collect_statistics

__all__ = [
    "OBSERVERS",
    "ChannelStatistics",
    "Feed",
    "MinMax",
    "Observer",
    "ObserverOptions",
    "RangeCache",
    "Samples",
    "TensorRange",
    "collect_ranges",
    "collect_statistics",
    "stream_values",
    "visit_values",
]
