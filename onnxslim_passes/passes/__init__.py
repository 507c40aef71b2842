"""The passes, one a file, listed by hand in the order of their stages."""

from onnxslim_passes.passes.base import Pass
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
from onnxslim_passes.passes.prune_gradually import PruneGradually
from onnxslim_passes.passes.prune_magnitude import PruneMagnitude
from onnxslim_passes.passes.quantize_dynamic import QuantizeDynamic
from onnxslim_passes.passes.quantize_static import QuantizeStatic
from onnxslim_passes.passes.quantize_weights import QuantizeWeights
from onnxslim_passes.passes.remove_dead_channels import RemoveDeadChannels
from onnxslim_passes.passes.round_weights import RoundWeights
from onnxslim_passes.passes.smooth_activations import SmoothActivations
from onnxslim_passes.passes.store_weights import StoreWeights
from onnxslim_passes.passes.strip_metadata import StripMetadata

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        FoldConstants,
        StripMetadata,
        FuseBatchNorm,
        FuseActivations,
        FuseScales,
        DedupeWeights,
        PruneMagnitude,
        PruneGradually,
        EqualizeChannels,
        RemoveDeadChannels,
        SmoothActivations,
        ClusterWeights,
        RoundWeights,
        QuantizeStatic,
        QuantizeDynamic,
        QuantizeWeights,
        ConvertFloat,
        CorrectBias,
        FineTune,
        StoreWeights,
    )
}

__all__ = ["PASSES"]
