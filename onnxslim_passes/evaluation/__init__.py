"""What a compressed model is worth: fidelity of outputs, task metrics, latency, size."""

from onnxslim_passes.evaluation.fidelity import Fidelity, OutputFidelity, compare_outputs
from onnxslim_passes.evaluation.latency import Latency, compare_latency
from onnxslim_passes.evaluation.metrics import METRICS, Metric, open_metric
from onnxslim_passes.evaluation.recorded import RecordedOutputs
from onnxslim_passes.evaluation.sizes import ModelSize, count_parameters, measure_size

__all__ = [
    "METRICS",
    "Fidelity",
    "Latency",
    "Metric",
    "ModelSize",
    "OutputFidelity",
    "RecordedOutputs",
    "compare_latency",
    "compare_outputs",
    "count_parameters",
    "measure_size",
    "open_metric",
]
