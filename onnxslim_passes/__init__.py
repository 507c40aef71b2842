"""Compress any ONNX model, believing nothing that ONNX Runtime has not run.

Example:
    from onnxslim_passes import Pipeline, PruneMagnitude, Samples, load

    model = load("model.onnx")
    pipeline = Pipeline([PruneMagnitude(sparsity=0.8)])
    result = pipeline.run(model, samples=Samples.open("calibration.npz"))
    result.model.save("small.onnx")
    result.report.save("report.json")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxslim_passes.calibration import Samples
    from onnxslim_passes.errors import OnnxSlimError
    from onnxslim_passes.model import Model, load
    from onnxslim_passes.passes import PASSES
    from onnxslim_passes.passes.base import (
        Context,
        Decision,
        Pass,
        PassResult,
        Stage,
        pass_options,
    )
    from onnxslim_passes.passes.cluster_weights import ClusterWeights
    from onnxslim_passes.passes.convert_float import ConvertFloat
    from onnxslim_passes.passes.correct_bias import CorrectBias
    from onnxslim_passes.passes.dedupe_weights import DedupeWeights
    from onnxslim_passes.passes.equalize_channels import EqualizeChannels
    from onnxslim_passes.passes.fine_tune import FineTune
    from onnxslim_passes.passes.fold_constants import FoldConstants
    from onnxslim_passes.passes.fuse_activations import FuseActivations
    from onnxslim_passes.passes.fuse_batch_norm import FuseBatchNorm
    from onnxslim_passes.passes.fuse_scales import FuseScales
    from onnxslim_passes.passes.inline_functions import InlineFunctions
    from onnxslim_passes.passes.prune_gradually import PruneGradually
    from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
    from onnxslim_passes.passes.quantize_dynamic import QuantizeDynamic
    from onnxslim_passes.passes.quantize_static import QuantizeStatic
    from onnxslim_passes.passes.quantize_to_rate import QuantizeToRate
    from onnxslim_passes.passes.quantize_weights import QuantizeWeights
    from onnxslim_passes.passes.remove_dead_channels import RemoveDeadChannels
    from onnxslim_passes.passes.round_weights import RoundWeights
    from onnxslim_passes.passes.smooth_activations import SmoothActivations
    from onnxslim_passes.passes.split_residuals import SplitResiduals
    from onnxslim_passes.passes.store_weights import StoreWeights
    from onnxslim_passes.passes.strip_metadata import StripMetadata
    from onnxslim_passes.pipeline import Pipeline, Result
    from onnxslim_passes.recipe import Recipe
    from onnxslim_passes.report.records import Report

__all__ = [
    "PASSES",
    "ClusterWeights",
    "Context",
    "ConvertFloat",
    "CorrectBias",
    "Decision",
    "DedupeWeights",
    "EqualizeChannels",
    "FineTune",
    "FoldConstants",
    "FuseActivations",
    "FuseBatchNorm",
    "FuseScales",
    "InlineFunctions",
    "Model",
    "OnnxSlimError",
    "Pass",
    "PassResult",
    "Pipeline",
    "PruneGradually",
    "PruneMagnitude",
    "QuantizeDynamic",
    "QuantizeStatic",
    "QuantizeToRate",
    "QuantizeWeights",
    "Recipe",
    "RemoveDeadChannels",
    "Report",
    "Result",
    "RoundWeights",
    "Samples",
    "SmoothActivations",
    "SplitResiduals",
    "Stage",
    "StoreWeights",
    "StripMetadata",
    "load",
    "pass_options",
]

# The module of every public name that is no pass. Names are imported when they are first asked
# for: scikit-learn and ONNX Runtime take seconds, and `--help` needs neither.
_MODULES = {
    "Context": "passes.base",
    "Decision": "report.records",
    "Model": "model",
    "OnnxSlimError": "errors",
    "PASSES": "passes",
    "Pass": "passes.base",
    "PassResult": "passes.base",
    "Pipeline": "pipeline",
    "Recipe": "recipe",
    "Report": "report.records",
    "Result": "pipeline",
    "Samples": "calibration",
    "Stage": "passes.base",
    "load": "model",
    "pass_options": "passes.base",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    passes = importlib.import_module(f"{__name__}.passes").PASSES
    return next(kind for kind in passes.values() if kind.__name__ == name)
