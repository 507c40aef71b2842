"""The passes, one a file, listed by hand in the order of their stages."""

import importlib
from collections.abc import Iterator, Mapping, MutableMapping

from onnxslim_passes.passes.base import Pass


class _Passes(MutableMapping[str, type[Pass]]):
    """Classes by the names of their passes, each imported when it is asked for.

    All of them take a second to import, which is more than most need to run.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)
        self._kinds: dict[str, type[Pass]] = {}

    def __getitem__(self, name: str) -> type[Pass]:
        if name not in self._kinds:
            module, _, kind = self._places[name].partition(":")
            self._kinds[name] = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
        return self._kinds[name]

    def __setitem__(self, name: str, kind: type[Pass]) -> None:
        self._places.setdefault(name, "")
        self._kinds[name] = kind

    def __delitem__(self, name: str) -> None:
        del self._places[name]
        self._kinds.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


PASSES: MutableMapping[str, type[Pass]] = _Passes(
    {
        "inline-functions": "inline_functions:InlineFunctions",
        "fold-constants": "fold_constants:FoldConstants",
        "strip-metadata": "strip_metadata:StripMetadata",
        "fuse-batch-norm": "fuse_batch_norm:FuseBatchNorm",
        "fuse-activations": "fuse_activations:FuseActivations",
        "fuse-scales": "fuse_scales:FuseScales",
        "dedupe-weights": "dedupe_weights:DedupeWeights",
        "prune-magnitude": "prune_magnitude:PruneMagnitude",
        "prune-gradually": "prune_gradually:PruneGradually",
        "equalize-channels": "equalize_channels:EqualizeChannels",
        "remove-dead-channels": "remove_dead_channels:RemoveDeadChannels",
        "smooth-activations": "smooth_activations:SmoothActivations",
        "cluster-weights": "cluster_weights:ClusterWeights",
        "round-weights": "round_weights:RoundWeights",
        "quantize-static": "quantize_static:QuantizeStatic",
        "quantize-dynamic": "quantize_dynamic:QuantizeDynamic",
        "quantize-weights": "quantize_weights:QuantizeWeights",
        "quantize-to-rate": "quantize_to_rate:QuantizeToRate",
        "convert-float": "convert_float:ConvertFloat",
        "correct-bias": "correct_bias:CorrectBias",
        "split-residuals": "split_residuals:SplitResiduals",
        "fine-tune": "fine_tune:FineTune",
        "store-weights": "store_weights:StoreWeights",
    }
)

__all__ = ["PASSES"]
