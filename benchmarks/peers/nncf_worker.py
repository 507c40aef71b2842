"""Worker: a quantizer of NNCF.

python -m peers.nncf_worker RECIPE MODEL SAMPLES OUT
"""

import sys
from pathlib import Path

import nncf  # type: ignore[import-not-found,unused-ignore]  # installed for the peers alone
import onnx

from peers.feeds import read_feeds


def quantize(recipe: str, source: Path, samples: Path, target: Path) -> None:
    """Writes the result; `-transformer` at the end of a recipe tells NNCF the kind of model."""
    model = onnx.load(source)
    kind = recipe.removesuffix("-transformer")
    if kind == "weights-8bit":
        onnx.save(nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM), target)
        return
    feeds = list(read_feeds(samples))
    result = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction={"mixed": True, "mixed-full-correction": False}[kind],
        model_type=nncf.ModelType.TRANSFORMER if recipe != kind else None,
    )
    onnx.save(result, target)


if __name__ == "__main__":
    quantize(sys.argv[1], *map(Path, sys.argv[2:5]))
