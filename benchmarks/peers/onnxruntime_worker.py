"""Worker: a quantizer of onnxruntime.

python -m peers.onnxruntime_worker RECIPE MODEL SAMPLES OUT
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from peers.feeds import read_feeds

WEIGHT_OPERATORS = ["Conv", "ConvTranspose", "Gemm", "MatMul"]


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """The samples, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._feeds = read_feeds(folder)

    def get_next(self) -> Any:
        """The next feed, or None after the last."""
        return next(self._feeds, None)


def static(source: Path, samples: Path, target: Path, **options: Any) -> None:
    """MinMax, uint8 activations, int8 weights per channel, Q/DQ pairs."""
    quantize_static(
        source,
        target,
        Reader(samples),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        **options,
    )


def static_weight_operators(source: Path, samples: Path, target: Path) -> None:
    """As `static`, for the operators that have weights alone."""
    constant = {"MatMulConstBOnly": True}
    static(source, samples, target, op_types_to_quantize=WEIGHT_OPERATORS, extra_options=constant)


def dynamic(source: Path, _samples: Path, target: Path) -> None:
    """8-bit weights per channel, activation scales at run time."""
    quantize_dynamic(source, target, per_channel=True)


def weights(source: Path, target: Path, bits: int) -> None:
    """Weights of MatMul in blocks of 32, arithmetic in float or 8 bit as the kernel likes."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), bits=bits, block_size=32, is_symmetric=False, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


RECIPES: dict[str, Callable[[Path, Path, Path], None]] = {
    "static": static,
    "static-weight-operators": static_weight_operators,
    "dynamic": dynamic,
    "matmul-8bit": lambda source, _, target: weights(source, target, 8),
    "matmul-4bit": lambda source, _, target: weights(source, target, 4),
}

if __name__ == "__main__":
    RECIPES[sys.argv[1]](*map(Path, sys.argv[2:5]))
