"""Which operators have a gradient rule; the only list there is.

An operator that is not here is differentiated through the function body that the ONNX standard
defines it with, if it has one (`expansion`).
"""

from onnxslim_passes.training.gradients.activations import ACTIVATIONS
from onnxslim_passes.training.gradients.convolution import CONVOLUTION
from onnxslim_passes.training.gradients.einsum import EINSUM
from onnxslim_passes.training.gradients.indexing import INDEXING
from onnxslim_passes.training.gradients.movement import MOVEMENT
from onnxslim_passes.training.gradients.normalization import NORMALIZATION
from onnxslim_passes.training.gradients.pointwise import POINTWISE
from onnxslim_passes.training.gradients.pooling import POOLING
from onnxslim_passes.training.gradients.products import PRODUCTS
from onnxslim_passes.training.gradients.quantization import QUANTIZATION
from onnxslim_passes.training.gradients.recurrent import RECURRENT
from onnxslim_passes.training.gradients.reductions import REDUCTIONS
from onnxslim_passes.training.gradients.resizing import RESIZING
from onnxslim_passes.training.gradients.step import Rule

RULES: dict[str, Rule] = {
    **ACTIVATIONS,
    **CONVOLUTION,
    **EINSUM,
    **INDEXING,
    **MOVEMENT,
    **NORMALIZATION,
    **POINTWISE,
    **POOLING,
    **PRODUCTS,
    **QUANTIZATION,
    **RECURRENT,
    **REDUCTIONS,
    **RESIZING,
}

# Operators whose first output, integers, is given a gradient as if it were not rounded.
STRAIGHT_THROUGH = frozenset(("DynamicQuantizeLinear", "QuantizeLinear"))

# Operators whose outputs do not change when a floating-point input changes a little, or that do
# not look at the values of their inputs.
STOPS = frozenset(
    (
        "ArgMax",
        "ArgMin",
        "Bernoulli",
        "Ceil",
        "ConstantOfShape",
        "Equal",
        "EyeLike",
        "Floor",
        "Greater",
        "GreaterOrEqual",
        "Hardmax",
        "IsInf",
        "IsNaN",
        "Less",
        "LessOrEqual",
        "Multinomial",
        "NonZero",
        "RandomNormalLike",
        "RandomUniformLike",
        "Shape",
        "Sign",
        "Size",
    )
)
