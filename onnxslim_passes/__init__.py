"""Compress any ONNX model, believing nothing that ONNX Runtime has not run.

Example:
    from onnxslim_passes import Pipeline, PruneMagnitude, Samples, load

    model = load("model.onnx")
    pipeline = Pipeline([PruneMagnitude(sparsity=0.8)])
    result = pipeline.run(model, samples=Samples.open("calibration.npz"))
    result.model.save("small.onnx")
    result.report.save("report.json")
"""

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import OnnxSlimError
from onnxslim_passes.model import Model, load
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.cluster_weights import ClusterWeights
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.passes.quantize_dynamic import QuantizeDynamic
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.pipeline import Pipeline, Result
from onnxslim_passes.recipe import Recipe
from onnxslim_passes.report.records import Report

__all__ = [
    "PASSES",
    "ClusterWeights",
    "Context",
    "Decision",
    "Model",
    "OnnxSlimError",
    "Pass",
    "PassResult",
    "Pipeline",
    "PruneMagnitude",
    "QuantizeDynamic",
    "QuantizeStatic",
    "Recipe",
    "Report",
    "Result",
    "Samples",
    "Stage",
    "StoreWeights",
    "load",
    "pass_options",
]
