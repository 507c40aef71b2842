"""What each target wants of a quantized model, as its documentation says: data, no decisions.

One table: for each target the formats that `quantize-static` chooses where the user has not, and
the rules that `violations.check_target` looks after, each with the document it comes from. What no
document says is listed under `unknown` rather than guessed. Only CPUs can be tried where this
package is developed; the other targets are checked by rule, not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onnxslim_passes.errors import unknown_name
from onnxslim_passes.passes.placement.pairs import PAIR_LIMIT
from onnxslim_passes.runtime import saturates_pairs

RuleKind = Literal[
    "activation-types",
    "weight-types",
    "zero-points",
    "per-channel",
    "weight-pairs",
    "no-operators",
    "bias-types",
    "bias-zero-point",
    "static-shapes",
    "no-control-flow",
    "all-quantized",
    "inputs-quantized",
    "pair-before-fusion",
    "residual-quantized",
    "fixed-16-bit",
    "constant-weights",
    "no-qdq",
]
"""What is looked at; `violations` has a function for each."""

Placement = Literal["pays", "inputs", "everywhere", "all", "nowhere"]
"""Where Q/DQ pairs go.

- pays: where the runtime on this CPU gains time, by measured costs and the runtime's own fusions.
- inputs: in front of nodes with weights and on the other operand of residual additions.
- everywhere: around every node with weights, and between them where there are integer kernels.
- all: on every float tensor.
- nowhere: the model stays in float.
"""


@dataclass(frozen=True)
class Reference:
    """A document.

    Attributes:
        title: its title and section.
        url: where it is.
    """

    title: str
    url: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that a target's documentation asks for.

    Attributes:
        name: unique within its target.
        kind: what is looked at.
        says: the rule in a sentence.
        allowed: types that may be, or the smallest and largest code.
        operators: those concerned; empty where the rule is for all.
        required: else a recommendation: the model runs, but slower or partly elsewhere.
        reference: the document that says so.
    """

    name: str
    kind: RuleKind
    says: str
    allowed: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    required: bool = True
    reference: Reference


@dataclass(frozen=True, kw_only=True)
class Formats:
    """What `quantize-static` writes for a target where the user asks for nothing else.

    Attributes:
        activations: type of activations.
        symmetric: zero points of activations in the middle of the codes' range.
        weights: type of weights, always symmetric.
        per_channel: a weight scale for each output channel.
        per_channel_operators: the operators for which there may be such.
        integer_bias: biases as int32 behind DequantizeLinear; else they stay float.
        reduce_range: int8 weights whose pairs of products fit 16 bits; None: if the runtime here
            needs it, which is asked of it.
        placement: where pairs go.
        hold_db: SQNR of the outputs that rounding activations should not fall below; 0: any.
    """

    activations: Literal["uint8", "int8"]
    weights: Literal["int8", "uint8"]
    symmetric: bool = False
    per_channel: bool = True
    per_channel_operators: tuple[str, ...] = ("Conv", "ConvTranspose", "MatMul", "Gemm")
    integer_bias: bool = True
    reduce_range: bool | None = False
    placement: Placement
    hold_db: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A runtime that a model is meant for.

    Attributes:
        name: as `--target` takes it.
        title: what it is.
        runs_here: whether ONNX Runtime's CPU provider can show what becomes of the model.
        formats: defaults of `quantize-static`.
        rules: what its documentation asks for.
        unknown: what it does not say, as far as we found.
    """

    name: str
    title: str
    runs_here: bool
    formats: Formats
    rules: tuple[Rule, ...]
    unknown: tuple[str, ...] = ()


# ---------------- documents

_ORT_QUANTIZATION = Reference(
    "ONNX Runtime, Quantize ONNX Models: Data type selection",
    "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
)
_ORT_REDUCE_RANGE = Reference(
    "ONNX Runtime, Quantize ONNX Models: When to use reduce-range and per-channel quantization",
    "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
)
_TRT_TYPES = Reference(
    "NVIDIA TensorRT, Working with Quantized Types",
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
    "work-quantized-types.html",
)
_TRT_PLACEMENT = Reference(
    "NVIDIA TensorRT Developer Guide, Q/DQ Layer-Placement Recommendations",
    "https://docs.nvidia.com/deeplearning/tensorrt/developer-guide/index.html#qdq-placement-recs",
)
_TRT_OPERATORS = Reference(
    "ONNX-TensorRT, Supported ONNX Operators",
    "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md",
)
_QNN = Reference(
    "ONNX Runtime, QNN Execution Provider: Running a model with QNN EP's HTP backend",
    "https://onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html",
)
_QNN_CONFIG = Reference(
    "ONNX Runtime, get_qnn_qdq_config (quantization/execution_providers/qnn/quant_config.py)",
    "https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/python/tools/quantization/"
    "execution_providers/qnn/quant_config.py",
)
_COREML = Reference(
    "ONNX Runtime, CoreML Execution Provider: Supported operators",
    "https://onnxruntime.ai/docs/execution-providers/CoreML-ExecutionProvider.html",
)
_COREML_OPTIONS = Reference(
    "ONNX Runtime, ORTCoreMLExecutionProviderOptions: onlyAllowStaticInputShapes",
    "https://onnxruntime.ai/docs/api/objectivec/Classes/ORTCoreMLExecutionProviderOptions.html",
)
_WEBGPU = Reference(
    "ONNX Runtime Web, WebGPU operators table",
    "https://github.com/microsoft/onnxruntime/blob/main/js/web/docs/webgpu-operators.md",
)
_WEBNN = Reference(
    "ONNX Runtime Web, WebNN operators table",
    "https://github.com/microsoft/onnxruntime/blob/main/js/web/docs/webnn-operators.md",
)
_WEB_INT32 = Reference(
    "pipecat-ai/smart-turn issue 33: WebGPU refuses DequantizeLinear of int32 with a zero point",
    "https://github.com/pipecat-ai/smart-turn/issues/33",
)

# ---------------- the table

_INTEGER_OPERATORS = (
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeLinear",
)
_CPU_RULES = (
    Rule(
        name="activation-types",
        kind="activation-types",
        says="activations are uint8 or int8",
        allowed=("uint8", "int8"),
        required=False,
        reference=_ORT_QUANTIZATION,
    ),
    Rule(
        name="weight-types",
        kind="weight-types",
        says="weights are int8 or uint8 (or fewer bits, which are made float first)",
        allowed=("int8", "uint8", "int4", "uint4", "int2", "uint2"),
        required=False,
        reference=_ORT_QUANTIZATION,
    ),
)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            title="ONNX Runtime on the CPU that runs this command",
            runs_here=True,
            formats=Formats(
                activations="uint8", weights="int8", reduce_range=None, placement="pays"
            ),
            rules=_CPU_RULES,
        ),
        Target(
            name="cpu-no-vnni",
            title="ONNX Runtime on an x86 CPU with AVX2 or AVX512 but without VNNI",
            runs_here=True,
            formats=Formats(
                activations="uint8", weights="int8", reduce_range=True, placement="pays"
            ),
            rules=(
                *_CPU_RULES,
                Rule(
                    name="weight-pairs",
                    kind="weight-pairs",
                    says="neighbouring int8 weights next to uint8 activations add up to at most "
                    "128: VPMADDUBSW saturates 16-bit sums of two products",
                    allowed=(str(PAIR_LIMIT),),
                    required=False,
                    reference=_ORT_REDUCE_RANGE,
                ),
            ),
        ),
        Target(
            name="tensorrt",
            title="NVIDIA TensorRT, explicit quantization, by itself or as an execution provider",
            runs_here=False,
            formats=Formats(
                activations="int8",
                weights="int8",
                symmetric=True,
                integer_bias=False,
                placement="inputs",
            ),
            rules=(
                Rule(
                    name="zero-points",
                    kind="zero-points",
                    says="all zero points are 0: quantization is symmetric",
                    reference=_TRT_OPERATORS,
                ),
                Rule(
                    name="activation-types",
                    kind="activation-types",
                    says="activations are int8 (or float8 e4m3)",
                    allowed=("int8", "float8_e4m3fn"),
                    reference=_TRT_TYPES,
                ),
                Rule(
                    name="weight-types",
                    kind="weight-types",
                    says="weights are int8, float8 e4m3, or int4 or float4 (weight-only)",
                    allowed=("int8", "float8_e4m3fn", "int4", "float4_e2m1fn"),
                    reference=_TRT_TYPES,
                ),
                Rule(
                    name="bias-types",
                    kind="bias-types",
                    says="biases stay float: DequantizeLinear takes no int32",
                    reference=_TRT_OPERATORS,
                ),
                Rule(
                    name="no-integer-operators",
                    kind="no-operators",
                    says="integer operators are not supported; Q/DQ pairs are",
                    operators=_INTEGER_OPERATORS,
                    reference=_TRT_OPERATORS,
                ),
                Rule(
                    name="inputs-quantized",
                    kind="inputs-quantized",
                    says="all inputs of a weighted operation are quantized, or none",
                    required=False,
                    reference=_TRT_PLACEMENT,
                ),
                Rule(
                    name="pair-before-fusion",
                    kind="pair-before-fusion",
                    says="no Q/DQ pair between a weighted operation and the BatchNormalization, "
                    "Relu or Clip behind it, which TensorRT fuses",
                    operators=("BatchNormalization", "Relu", "Clip"),
                    required=False,
                    reference=_TRT_PLACEMENT,
                ),
                Rule(
                    name="residual-quantized",
                    kind="residual-quantized",
                    says="the other operand of an Add behind a quantized weighted operation is "
                    "quantized, too, so that both are fused",
                    required=False,
                    reference=_TRT_PLACEMENT,
                ),
            ),
            unknown=(
                "which pairs TensorRT fuses depends on the GPU and its version: build the engine "
                "and read its layers",
            ),
        ),
        Target(
            name="qnn",
            title="Qualcomm HTP (NPU), QNN execution provider",
            runs_here=False,
            formats=Formats(
                activations="uint8",
                weights="uint8",
                per_channel=False,
                per_channel_operators=("Conv", "ConvTranspose"),
                placement="all",
                hold_db=20.0,
            ),
            rules=(
                Rule(
                    name="static-shapes",
                    kind="static-shapes",
                    says="shapes are fixed: dynamic ones are not supported",
                    reference=_QNN,
                ),
                Rule(
                    name="no-control-flow",
                    kind="no-control-flow",
                    says="Loop, If and Scan are not supported",
                    operators=("Loop", "If", "Scan"),
                    reference=_QNN,
                ),
                Rule(
                    name="all-quantized",
                    kind="all-quantized",
                    says="every node has quantized inputs and outputs: the HTP backend runs "
                    "quantized models only (a Relu or Clip behind a node counts as part of it)",
                    reference=_QNN,
                ),
                Rule(
                    name="activation-types",
                    kind="activation-types",
                    says="activations are uint8 or uint16",
                    allowed=("uint8", "uint16"),
                    reference=_QNN,
                ),
                Rule(
                    name="weight-types",
                    kind="weight-types",
                    says="weights are 8-bit (or int4)",
                    allowed=("uint8", "int8", "int4"),
                    reference=_QNN_CONFIG,
                ),
                Rule(
                    name="product-types",
                    kind="weight-types",
                    says="MatMul takes uint8 and uint16 only",
                    allowed=("uint8", "uint16"),
                    operators=("MatMul",),
                    reference=_QNN,
                ),
                Rule(
                    name="per-channel",
                    kind="per-channel",
                    says="scales per channel for Conv and ConvTranspose only, not for MatMul",
                    operators=("Conv", "ConvTranspose"),
                    reference=_QNN_CONFIG,
                ),
                Rule(
                    name="fixed-16-bit",
                    kind="fixed-16-bit",
                    says="uint16 outputs of Sigmoid have scale 1/65536 and zero point 0, of Tanh "
                    "1/32768 and 32768",
                    operators=("Sigmoid", "Tanh"),
                    reference=_QNN_CONFIG,
                ),
            ),
            unknown=(
                "whether scales per channel need signed codes is not said; the defaults of "
                "get_qnn_qdq_config, uint8 and one scale a tensor, are taken",
                "types differ by operator and SDK version: HtpOpDefSupplement of the QNN SDK has "
                "them, which is not encoded here",
                "whether a float node in between falls back to the CPU provider or to fp16 depends "
                "on the SoC and on enable_htp_fp16_precision",
            ),
        ),
        Target(
            name="coreml",
            title="Apple CoreML execution provider",
            runs_here=False,
            formats=Formats(activations="uint8", weights="int8", placement="nowhere"),
            rules=(
                Rule(
                    name="no-qdq",
                    kind="no-qdq",
                    says="neither Q/DQ nor integer operators are among the supported operators: "
                    "they run on the CPU provider and split the graph",
                    operators=("QuantizeLinear", "DequantizeLinear", *_INTEGER_OPERATORS),
                    required=False,
                    reference=_COREML,
                ),
                Rule(
                    name="constant-weights",
                    kind="constant-weights",
                    says="weights of Conv, Gemm and MatMul are constants",
                    operators=("Conv", "Gemm", "MatMul"),
                    required=False,
                    reference=_COREML,
                ),
                Rule(
                    name="static-shapes",
                    kind="static-shapes",
                    says="shapes are fixed: dynamic ones can be slower",
                    required=False,
                    reference=_COREML_OPTIONS,
                ),
            ),
            unknown=(
                "nothing is said of quantized models, of int8 arithmetic, or of the types that the "
                "Neural Engine uses; float16 is CoreML's own choice at run time",
            ),
        ),
        Target(
            name="web",
            title="ONNX Runtime Web: WebAssembly, WebGPU, WebNN",
            runs_here=False,
            formats=Formats(activations="uint8", weights="uint8", placement="everywhere"),
            rules=(
                *_CPU_RULES,
                Rule(
                    name="no-integer-operators",
                    kind="no-operators",
                    says="integer operators are not in WebGPU's table and run on WebAssembly",
                    operators=_INTEGER_OPERATORS,
                    required=False,
                    reference=_WEBGPU,
                ),
                Rule(
                    name="no-integer-operators-webnn",
                    kind="no-operators",
                    says="QLinear operators are not in WebNN's table; Q/DQ pairs are",
                    operators=("QLinearConv", "QLinearMatMul"),
                    required=False,
                    reference=_WEBNN,
                ),
                Rule(
                    name="bias-zero-point",
                    kind="bias-zero-point",
                    says="DequantizeLinear of an int32 bias has no zero point: WebGPU stops at one",
                    reference=_WEB_INT32,
                ),
            ),
            unknown=(
                "whether WebAssembly's integer kernels saturate as VPMADDUBSW does is not said: "
                "weights are uint8, which cannot (ONNX Runtime, Data type selection)",
                "the speed of integers on WebAssembly, WebGPU and WebNN is not documented; WebGPU "
                "dequantizes Q/DQ and computes in float",
            ),
        ),
    )
}
"""Every target by its name."""


def find_target(name: str) -> Target:
    """A target by its name.

    Raises:
        UnknownNameError: there is none; with the nearest name.
    """
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]


def needs_narrow_weights(target: Target) -> bool:
    """Whether pairs of products must fit 16 bits; for this CPU, the runtime is asked."""
    narrow = target.formats.reduce_range
    return saturates_pairs() if narrow is None else narrow


def takes_wide(target: Target) -> bool:
    """Whether activations of 16 bits are among those that a target's documentation allows."""
    rules = [rule for rule in target.rules if rule.kind == "activation-types"]
    return any({"uint16", "int16"} & set(rule.allowed) for rule in rules)
