"""Which operators have a gradient rule; the only list there is.

An operator that is not here is differentiated through the function body that the ONNX standard
defines it with, if it has one (`expansion`).
"""

from onnxslim_passes.training.gradients.movement import MOVEMENT
from onnxslim_passes.training.gradients.normalization import NORMALIZATION
from onnxslim_passes.training.gradients.pointwise import POINTWISE
from onnxslim_passes.training.gradients.products import PRODUCTS
from onnxslim_passes.training.gradients.reductions import REDUCTIONS
from onnxslim_passes.training.gradients.step import Rule

RULES: dict[str, Rule] = {
    **MOVEMENT,
    **NORMALIZATION,
    **POINTWISE,
    **PRODUCTS,
    **REDUCTIONS,
}

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
