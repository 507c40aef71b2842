"""What ONNX Runtime can do with integers on a CPU, and what it costs: data, no decisions.

Found by giving each operator Q/DQ on all sides and reading the optimized graph, and by timing it
between two integer convolutions (`docs/design/placement.md` has both tables). An operator that is
not listed runs in float, either because no integer kernel exists or because it is slower than the
float kernel with both conversions: Softmax (6x), AveragePool (20x), nearest Resize in the layout
of integer convolutions (10x).
"""

from dataclasses import dataclass
from typing import Literal

WEIGHT_OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Operators whose weights are quantized."""

CLAMPS = ("Relu", "Clip")
"""Operators that vanish into a QuantizeLinear behind them: saturation does their work."""

FUSED_INTO_GEMM = frozenset(
    (
        *("Elu", "HardSigmoid", "LeakyRelu", "Relu", "Clip", "Selu", "Sigmoid", "Softplus"),
        *("Softsign", "Tanh", "ThresholdedRelu"),
    )
)
"""Operators that the runtime merges into a float Gemm before it looks at Q/DQ, unless a pair stands
between: a Gemm in front of one needs an integer output to become an integer kernel."""

SELF_QUANTIZED = frozenset(("Conv", "ConvTranspose", "Gemm"))
"""Float operators whose weights the runtime quantizes by itself, one scale a tensor, where a
DequantizeLinear stands in front and a QuantizeLinear behind."""

SLOW_UPSTREAM = frozenset(("MaxPool",))
"""Float operators in front of which the runtime moves a QuantizeLinear from behind, although their
integer kernel is far slower there (MaxPool outside of the layout of integer convolutions: 40x). A
Max of one tensor, which is a copy, keeps the QuantizeLinear where it was put."""


@dataclass(frozen=True, kw_only=True)
class Between:
    """An operator without weights that the runtime runs on integers.

    Attributes:
        inputs: whether its first input or all of them are data; others are shapes or indices.
        same_grid: it moves or selects values, so that the runtime drops the pair around it only
            if the output's grid is the input's.
        float_ns: nanoseconds an element in float.
        integer_ns: nanoseconds an element on integers.
    """

    inputs: Literal["first", "all"]
    same_grid: bool
    float_ns: float
    integer_ns: float


_MOVED = Between(inputs="first", same_grid=True, float_ns=0.2, integer_ns=0.06)
_RESHAPED = Between(inputs="first", same_grid=True, float_ns=0.0, integer_ns=0.0)

BETWEEN: dict[str, Between] = {
    "Add": Between(inputs="all", same_grid=False, float_ns=0.30, integer_ns=0.19),
    "Mul": Between(inputs="all", same_grid=False, float_ns=0.30, integer_ns=0.32),
    "Concat": Between(inputs="all", same_grid=False, float_ns=0.20, integer_ns=0.07),
    "MaxPool": Between(inputs="first", same_grid=True, float_ns=0.15, integer_ns=0.15),
    "GlobalAveragePool": Between(inputs="first", same_grid=False, float_ns=0.07, integer_ns=0.05),
    "LeakyRelu": Between(inputs="first", same_grid=False, float_ns=0.16, integer_ns=0.26),
    "Sigmoid": Between(inputs="first", same_grid=False, float_ns=0.41, integer_ns=0.40),
    "Reshape": _RESHAPED,
    "Flatten": _RESHAPED,
    "Squeeze": _RESHAPED,
    "Unsqueeze": _RESHAPED,
    "Transpose": _MOVED,
    "Slice": _MOVED,
    "Split": _MOVED,
    "Gather": _MOVED,
    "DepthToSpace": _MOVED,
}


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Time on one thread, in nanoseconds; only ratios matter to the choice.

    Attributes:
        quantize: QuantizeLinear, an element, with the change of layout.
        dequantize: DequantizeLinear, an element, with the change of layout.
        launch: one more node.
        float_mac: one multiplication in a float convolution or product.
        float_depthwise_mac: the same where each channel is its own group.
        integer_mac: one multiplication in an integer convolution.
        integer_grouped_mac: the same with several channels a group.
        integer_depthwise_mac: the same where each channel is its own group.
        integer_product_mac: the same in an integer matrix product.
        tap: gathering one input position under one kernel position for an integer convolution.
        element: reading or writing one element of a convolution.
        weight_byte: fetching one byte of weights.
        rounding: what one more rounding of an element is held to cost, so that a node of no
            clear gain stays in float and exact.
        margin: how much faster integers have to be for a node with weights.
    """

    quantize: float = 0.20
    dequantize: float = 0.23
    launch: float = 700.0
    float_mac: float = 1 / 45
    float_depthwise_mac: float = 1 / 21
    integer_mac: float = 1 / 200
    integer_grouped_mac: float = 1 / 60
    integer_depthwise_mac: float = 1 / 20
    integer_product_mac: float = 1 / 140
    tap: float = 2.0
    element: float = 0.1
    weight_byte: float = 0.1
    rounding: float = 0.1
    margin: float = 1.1


CPU = Costs()
"""An x86 CPU with int8 dot products (AVX512-VNNI)."""
