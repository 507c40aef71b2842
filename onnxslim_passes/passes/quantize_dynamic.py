"""`quantize-dynamic`: int8 weights of products and embeddings, activation scales at run time."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from pydantic import Field

from onnxslim_passes.calibration import collect_ranges
from onnxslim_passes.errors import UnsupportedModelError
from onnxslim_passes.model import Constant, Graph, Model, Node, Types, Use, Variable, Weight
from onnxslim_passes.numerics.affine import AffineGrid, quantize
from onnxslim_passes.numerics.common_codes import kept_grid
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.embeddings import EmbeddingRewriter, is_embedding, objection
from onnxslim_passes.passes.placement import (
    find_target,
    needs_narrow_weights,
    pairs_decision,
    target_decisions,
)
from onnxslim_passes.passes.placement.pairs import pair_scale
from onnxslim_passes.passes.quantized import integer_decisions, stored_reason
from onnxslim_passes.passes.selection import Selection

_OPSET = 11  # the first with DynamicQuantizeLinear

_PRODUCTS = ("MatMul", "Gemm")

_FEEDS_LOOKED_AT = 4  # for infinities, which come from the model more than from single samples

_NOT_DYNAMIC = {
    "Conv": "ConvInteger runs at 0.05 to 0.2x of float speed; quantize-static makes it faster",
    "ConvTranspose": "ONNX has no integer ConvTranspose",
    "LSTM": "an integer LSTM exists outside of the standard operators only",
    "GRU": "ONNX has no integer GRU",
    "RNN": "ONNX has no integer RNN",
    "Einsum": "ONNX has no integer Einsum; write it as MatMul",
}
"""Operators with weights that stay in float, and why."""


@pass_options
class QuantizeDynamic(Selection, Pass):
    """Stores weights of MatMul, Gemm and embeddings as int8; activations are quantized as it runs.

    ``A @ W + b`` becomes ``DynamicQuantizeLinear(A)``, ``MatMulInteger``, ``Cast``, one ``Mul`` by
    both scales and ``Add``, which ONNX Runtime fuses into one kernel. A table of embeddings becomes
    int8 rows and a scale a row: ``Gather`` of both, ``Cast`` and ``Mul``.
    """

    name: ClassVar[str] = "quantize-dynamic"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    summary: ClassVar[str] = "8-bit weights of MatMul, Gemm and embeddings; needs no samples"
    references: ClassVar[tuple[str, ...]] = (
        "Zafrir et al., Q8BERT: Quantized 8Bit BERT, arXiv:1910.06188",
    )

    per_channel: Annotated[
        bool, Field(description="a weight scale for each output channel, not one for the tensor")
    ] = True
    embeddings: Annotated[
        bool, Field(description="store embedding tables (Gather) as int8 rows with a scale each")
    ] = True
    reduce_range: Annotated[
        bool | None,
        Field(
            description="int8 weights scaled so that no two products saturate 16 bits, for x86 "
            "CPUs without VNNI; none: what the target wants, on cpu if the runtime here saturates"
        ),
    ] = None

    def apply(self, model: Model, context: Context) -> PassResult:
        """Rewrites every node that fits, in all graphs; see `docs/passes/quantize-dynamic.md`."""
        self.check(model)
        said = integer_decisions(model)
        candidates = list(self._candidates(model))
        changed = False
        if any(reason is None for _, reason in candidates):
            changed = self._raise_opset(model)
            candidates = list(self._candidates(model))
            candidates = _without_boundless(model, candidates, context)
        target = find_target(context.target)
        narrow = needs_narrow_weights(target) if self.reduce_range is None else self.reduce_range
        rewriter = _Rewriter(model, per_channel=self.per_channel, narrow=narrow)
        decisions = []
        for node, reason in candidates:
            if reason is None:
                decisions.append(rewriter.rewrite(node))
                changed = True
            else:
                decisions.append(Decision(where=node.where, taken=False, reason=reason))
        if changed:
            model.remove_unused()
        said += target_decisions(model, context.target)
        if narrow and any(d.taken and d.figures.get("weights") for d in decisions):
            said.append(pairs_decision(context.target))
        return PassResult(changed=changed, decisions=(*decisions, *said))

    def _raise_opset(self, model: Model) -> bool:
        try:
            return model.at_least_opset(_OPSET)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"quantize-dynamic: {error}") from error

    def _candidates(self, model: Model) -> Iterator[tuple[Node, str | None]]:
        """Every node with weights, and why it stays as it is, or None."""
        types = model.types()
        weights = {weight.constant: weight for weight in model.weights()}
        refused: dict[Node, str] = {}
        nodes = [node for node in model.nodes() if _has_weight(node)]
        for node in nodes:
            reason = self._refusal(node, weights, types)
            if reason is not None:
                refused[node] = reason
        taken = {node for node in nodes if node not in refused}
        for node in taken:
            stranger = _stranger(weights[_weight_of(node)], taken)
            if stranger is not None:
                refused[node] = f"its weight also feeds {stranger}, so that a float copy stays"
        for node in nodes:
            yield node, refused.get(node)

    def _refusal(self, node: Node, weights: dict[Constant, Weight], types: Types) -> str | None:
        if node.op in _NOT_DYNAMIC:
            stored = stored_reason(node)
            return stored or _NOT_DYNAMIC[str(node.op)]
        if node.op == "Gather" and not self.embeddings:
            return "embeddings=false"
        reason = _unfit(node, types)
        if reason is not None:
            return reason
        verdict = self.verdict(weights[_weight_of(node)])
        return verdict.reason if verdict is not None else None


def _without_boundless(
    model: Model, candidates: list[tuple[Node, str | None]], context: Context
) -> list[tuple[Node, str | None]]:
    """The candidates, those refused whose activation is not finite on some samples.

    One infinity makes the scale infinite and the product NaN. Without samples it is not seen.
    """
    here = {tensor for node in model.graph.nodes for tensor in (*node.inputs, *node.outputs)}
    taken = [node for node, reason in candidates if reason is None and node.op in _PRODUCTS]
    tensors = [tensor for node in taken if (tensor := node.inputs[0]) in here]
    if context.samples is None or not tensors:
        return candidates
    ranges = collect_ranges(
        model, list(dict.fromkeys(tensors)), context.samples, strict=False, most=_FEEDS_LOOKED_AT
    )
    boundless = {name for name, known in ranges.items() if not known.finite}
    why = "its activation held NaN or infinity on the samples, for which there is no scale"
    return [
        (node, why if node in taken and str(node.inputs[0].name) in boundless else reason)
        for node, reason in candidates
    ]


def _has_weight(node: Node) -> bool:
    """Whether a node is one that a user would expect to see quantized."""
    if node.domain:
        return False
    if node.op in _PRODUCTS:
        return True
    return is_embedding(node) or node.op in _NOT_DYNAMIC


def _unfit(node: Node, types: Types) -> str | None:
    """Why a MatMul, Gemm or Gather cannot be rewritten, or None."""
    if node.op == "Gather":
        return objection(node)
    left, right = node.inputs[0], node.inputs[1]
    if not isinstance(right, Constant):
        return _not_constant(node, left, right)
    if isinstance(left, Constant):
        return "it takes constants only; run fold-constants first"
    known = types.of(left)
    if known is not None and known.rank == 1:
        return "its data is a vector, which MatMulInteger does not take"
    if node.graph.opset < _OPSET and node.graph.is_function:
        return f"its function has opset {node.graph.opset}; opset {_OPSET} is needed"
    return _unfit_constant(right) or _unfit_addend(node)


def _not_constant(node: Node, left: Variable | Constant, right: Variable) -> str:
    stored = stored_reason(node)
    if stored is not None:
        return stored
    maker = right.inputs[0] if right.inputs else None
    if maker is not None and maker.inputs and isinstance(maker.inputs[0], Constant):
        return f"its weight comes through {maker.op} {maker.name!r}; run fold-constants first"
    if isinstance(left, Constant):
        return "the weight is its first operand, for which the runtime has no integer kernel"
    if maker is None and node.graph.is_function:
        return "its second operand is an input of the function that it stands in"
    return "both operands are activations"


def _unfit_constant(constant: Constant) -> str | None:
    if constant.dtype != np.dtype(np.float32):
        return f"its weight is {constant.dtype.name}; only float32 is quantized"
    if constant.input_info is not None:
        return "its weight is also an input of the model, which a caller may override"
    if len(constant.shape) != 2 or constant.size == 0:
        return f"its weight has shape {constant.shape}; a matrix is needed"
    if not np.isfinite(constant.values).all():
        return "its weight holds NaN or infinity"
    return None


def _unfit_addend(node: Node) -> str | None:
    """Why the scaling or the addend of a Gemm stands in the way, or None."""
    if node.op != "Gemm" or len(node.inputs) < 3 or node.inputs[2].is_empty():
        return None
    addend = node.inputs[2]
    if not isinstance(addend, Constant) and node.attr("beta", 1.0) != 1.0:
        return "its addend is not constant and beta is not 1"
    if isinstance(addend, Constant) and addend.dtype != np.dtype(np.float32):
        return f"its bias is {addend.dtype.name}; only float32 is quantized"
    return None


def _weight_of(node: Node) -> Constant:
    constant = node.inputs[0 if node.op == "Gather" else 1]
    assert isinstance(constant, Constant)  # asked of candidates only
    return constant


def _stranger(weight: Weight, taken: set[Node]) -> str | None:
    """A use of the weight that keeps its float values in the file, or None."""

    def stays(use: Use) -> bool:
        position = 0 if use.node.op == "Gather" else 1
        return not (use.node in taken and use.direct and use.input_index == position)

    return next((use.node.where for use in weight.uses if stays(use)), None)


class _Rewriter:
    """Rewrites nodes, sharing the codes of a weight and the quantized form of an activation."""

    def __init__(self, model: Model, *, per_channel: bool, narrow: bool) -> None:
        self._model = model
        self._per_channel = per_channel
        self._narrow = narrow
        self._activations: dict[tuple[Graph, Variable], Node] = {}
        self._weights: dict[tuple[Constant, bool, float], tuple[Constant, Constant, Constant]] = {}
        self._embeddings = EmbeddingRewriter()

    def rewrite(self, node: Node) -> Decision:
        """Replaces one MatMul, Gemm or Gather."""
        if node.op == "Gather":
            return self._embeddings.rewrite(node)
        weight, where, output = _weight_of(node), node.where, node.outputs[0]
        result = self._product(node, weight)
        node.graph.remove_node(node)
        result.outputs[0] = output
        scales = "column" if self._per_channel else "tensor"
        return Decision(
            where=where,
            taken=True,
            reason=f"int8 weights with a scale per {scales}, activation scale at run time",
            figures={"weights": weight.size, "before_bytes": weight.nbytes},
        )

    # ---- products

    def _product(self, node: Node, weight: Constant) -> Node:
        """The last node of the integer form of a MatMul or Gemm."""
        graph, hint = node.graph, node.outputs[0].name
        codes, scale, zero_point = self._codes(node, weight)
        data = self._quantized(graph, self._left_operand(node))
        values, data_scale, data_zero_point = data.outputs
        total = graph.add_node(
            "MatMulInteger",
            [values, codes, data_zero_point, zero_point],
            outputs=[f"{hint}_integer"],
            name=f"{node.name}_integer" if node.name else None,
        ).outputs[0]
        attrs = {"to": onnx.TensorProto.FLOAT}
        total = graph.add_node("Cast", [total], outputs=[f"{hint}_cast"], attrs=attrs).outputs[0]
        both = graph.add_node("Mul", [data_scale, scale], outputs=[f"{hint}_scale"]).outputs[0]
        result = graph.add_node("Mul", [total, both], outputs=[f"{hint}_scaled"])
        addend = self._addend(node)
        if addend is not None:
            result = graph.add_node("Add", [result.outputs[0], addend], outputs=[f"{hint}_biased"])
        return result

    def _left_operand(self, node: Node) -> Variable:
        operand: Variable = node.inputs[0]
        if node.op == "Gemm" and node.attr("transA", 0):
            hint, attrs = f"{operand.name}_transposed", {"perm": [1, 0]}
            made = node.graph.add_node("Transpose", [operand], outputs=[hint], attrs=attrs)
            operand = made.outputs[0]
        return operand

    def _quantized(self, graph: Graph, tensor: Variable) -> Node:
        """The DynamicQuantizeLinear of an activation, one for all its products in a graph."""
        key = (graph, tensor)
        if key not in self._activations:
            hint = tensor.name
            self._activations[key] = graph.add_node(
                "DynamicQuantizeLinear",
                [tensor],
                outputs=[f"{hint}_quantized", f"{hint}_scale", f"{hint}_zero_point"],
            )
        return self._activations[key]

    def _codes(self, node: Node, weight: Constant) -> tuple[Constant, Constant, Constant]:
        """int8 codes (K, N), float32 scale and int8 zero point, (N,) or ()."""
        transposed = bool(node.op == "Gemm" and node.attr("transB", 0))
        gain = float(node.attr("alpha", 1.0)) if node.op == "Gemm" else 1.0
        key = (weight, transposed, gain)
        if key not in self._weights:
            values = weight.values * np.float32(gain)
            axis = 1 if self._per_channel else None
            least = pair_scale(node, values, axis) if self._narrow else 0.0
            values = values.T if transposed else values
            grid = kept_grid(values, np.int8, axis).at_least(least)
            self._weights[key] = self._store(weight, values, grid)
        return self._weights[key]

    def _store(
        self, weight: Constant, values: npt.NDArray[Any], grid: AffineGrid
    ) -> tuple[Constant, Constant, Constant]:
        owner = weight.owner
        assert owner is not None  # every constant of a loaded model has one
        return (
            owner.add_constant(f"{weight.name}_quantized", quantize(values, grid)),
            owner.add_constant(f"{weight.name}_scale", grid.scale),
            owner.add_constant(f"{weight.name}_zero_point", grid.zero_point),
        )

    def _addend(self, node: Node) -> Variable | Constant | None:
        if node.op != "Gemm" or len(node.inputs) < 3 or node.inputs[2].is_empty():
            return None
        addend: Variable | Constant = node.inputs[2]
        beta = np.float32(node.attr("beta", 1.0))
        if isinstance(addend, Constant) and beta != 1:
            return node.graph.add_constant(f"{addend.name}_scaled", addend.values * beta)
        return addend
