"""Moves scales and shifts of channels into the layer before them.

A batch normalization that is not training computes, for channel c,

    y = scale (x - mean) / sqrt(variance + epsilon) + B  =  s x + t
    s = scale / sqrt(variance + epsilon),    t = B - mean s

and ``Mul``, ``Div``, ``Add`` and ``Sub`` with a constant for each channel are the same with s or t
missing. If x is the output of a layer that is linear in its weight, x = W * a + b, then

    y = s (W * a + b) + t  =  (s W) * a + (s b + t)

so that the layer takes the weight ``s W`` (s along its output channels) and the bias ``s b + t``,
and the node after it goes. The output channels are axis 0 of the weight of a Conv; axis 1 within
each group of a ConvTranspose; the last axis of a MatMul's B; of Gemm's B the last, or with transB
the first. A MatMul has no bias: its shift is the ``Add`` that follows, and a new one if none does.
Gemm multiplies its bias by beta: the shift is added as t / beta.

s and t are computed in float64 and the products rounded once, to the type of the weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxslim_passes.model import FLOAT_DTYPES, Constant, Model, Node, Types, Variable
from onnxslim_passes.model.exporting import sorted_nodes
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options

__all__ = ["FuseBatchNorm"]

Vector: TypeAlias = npt.NDArray[np.float64]
Array: TypeAlias = npt.NDArray[Any]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ARITHMETIC = ("Mul", "Div", "Add", "Sub")


@dataclass(frozen=True)
class _Affine:
    """y = scale x + shift; float64, shape (C,), finite."""

    scale: Vector
    shift: Vector


@dataclass(frozen=True)
class _Layer:
    """A layer that may take a scale and a shift.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        weight: its weight.
        addition: of a MatMul, the `Add` of a constant behind it, if there is one.
    """

    node: Node
    weight: Constant
    addition: Node | None = None

    @property
    def output(self) -> Variable:
        """What the scale and the shift are for."""
        output: Variable = (self.addition or self.node).outputs[0]
        return output

    @property
    def channels(self) -> int:
        """Number of output channels, C."""
        if self.node.op == "ConvTranspose":
            return int(self.weight.shape[1]) * int(self.node.attr("group", 1))
        if self.node.op == "Conv" or (self.node.op == "Gemm" and self.node.attr("transB", 0)):
            return self.weight.shape[0]
        return self.weight.shape[-1]

    @property
    def is_convolution(self) -> bool:
        """Whether the channels are axis 1 of the output; of the others they are the last."""
        return self.node.op in ("Conv", "ConvTranspose")

    @property
    def bias(self) -> Variable | Constant | None:
        """What is added, if anything."""
        if self.addition is not None:
            operands = _split(self.addition)
            return None if operands is None else operands[1]
        if self.node.op == "MatMul" or len(self.node.inputs) < 3:
            return None
        bias: Variable | Constant = self.node.inputs[2]
        return None if bias.is_empty() else bias

    @property
    def beta(self) -> float:
        """Factor of the bias."""
        return float(self.node.attr("beta", 1.0)) if self.node.op == "Gemm" else 1.0

    def scaled_weight(self, scale: Vector) -> Array:
        """The weight with each output channel multiplied; float64."""
        weight = self.weight.values.astype(np.float64)
        rest = (1,) * (weight.ndim - 2)
        if self.node.op == "ConvTranspose":
            groups = int(self.node.attr("group", 1))
            grouped = weight.reshape(groups, -1, *weight.shape[1:])
            product = grouped * scale.reshape(groups, 1, -1, *rest)
            return product.reshape(weight.shape)
        along_first = self.node.op == "Conv" or self.node.attr("transB", 0)
        return weight * (scale.reshape(-1, 1, *rest) if along_first else scale)

    def moved_bias(self, affine: _Affine) -> Array:
        """The bias after the scale and the shift; float64, in the bias's shape if it has one."""
        if self.bias is None:
            return affine.shift / self.beta
        assert isinstance(self.bias, Constant)  # others are refused before
        return self.bias.values.astype(np.float64) * affine.scale + affine.shift / self.beta


@pass_options
class FuseBatchNorm(Pass):
    """Batch normalization and arithmetic by channel become part of the layer before."""

    name: ClassVar[str] = "fuse-batch-norm"
    stage: ClassVar[Stage] = Stage.PREPARE
    summary: ClassVar[str] = "batch normalization and scales of channels move into the layer before"
    references: ClassVar[tuple[str, ...]] = (
        "Ioffe and Szegedy 2015, Batch Normalization: Accelerating Deep Network Training by "
        "Reducing Internal Covariate Shift, arXiv:1502.03167",
        "Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient "
        "Integer-Arithmetic-Only Inference, section 3.2, arXiv:1712.05877",
    )
    lossless: ClassVar[bool] = True

    def apply(self, model: Model, context: Context) -> PassResult:
        """Fuses in all graphs, from the inputs on, so that whole chains disappear."""
        fusion = _Fusion(model)
        decisions = tuple(
            decision
            for graph in list(model.graphs())
            for node in sorted_nodes(graph)
            for decision in fusion.decide(node)
        )
        changed = any(decision.taken for decision in decisions)
        if changed:
            model.remove_unused()
        return PassResult(changed, decisions)


class _Fusion:
    """The pass on one model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._outputs = {tensor for graph in model.graphs() for tensor in graph.outputs}

    @cached_property
    def _types(self) -> Types:
        """Ranks, which no fusion changes."""
        return self._model.types()

    def decide(self, node: Node) -> Iterator[Decision]:
        """Fuses a node if that can be done; says nothing of nodes that are no candidates."""
        if node.domain or not node.inputs:
            return
        if node.op == "BatchNormalization":
            taken = node.inputs[0]
        else:
            operands = _split(node) if node.op in _ARITHMETIC else None
            if operands is None or not _is_behind_layer(operands[0]):
                return
            taken = operands[0]
        where, label = node.where, node.op
        layer = self._layer(node, taken)
        if isinstance(layer, str):
            yield Decision(where=where, taken=False, reason=layer)
            return
        affine = self._affine(node, layer)
        reason = affine if isinstance(affine, str) else self._fuse(node, layer, affine)
        if reason:
            yield Decision(where=where, taken=False, reason=reason)
            return
        yield Decision(
            where=where,
            taken=True,
            reason=f"{label} became part of {layer.node.op} {layer.node.where!r}",
            figures={"channels": layer.channels},
        )

    # ---- what it needs

    def _layer(self, node: Node, taken: Variable | Constant) -> _Layer | str:
        """The layer whose output a node takes, or why there is none that can be changed."""
        maker = taken.inputs[0] if taken.inputs else None
        addition = None
        if maker is not None and maker.op == "Add" and _is_behind_layer(taken):
            addition, maker = maker, _source(maker)
        if maker is None or maker.op not in _LAYERS or maker.domain:
            return f"follows {maker.op if maker else 'an input'}, not a layer with a weight"
        what = f"{maker.op} {maker.where!r}"
        for tensor in (taken, maker.outputs[0]):
            if tensor in self._outputs:
                return f"what {what} gives is an output of its graph, too"
            if len(tensor.outputs) > 1:
                return f"what {what} gives has {len(tensor.outputs)} consumers"
        if any(other.graph is not maker.graph for other in (node, addition) if other is not None):
            return f"{what} stands in an outer graph"
        if (reason := self._unusable(maker.inputs[1], "weight", maker)) is not None:
            return f"{what} {reason}"
        layer = _Layer(maker, maker.inputs[1], addition)
        if len(layer.weight.shape) < 2 or (maker.op == "MatMul" and len(layer.weight.shape) != 2):
            return f"the weight of {what} is not a matrix"
        if len(layer.weight.outputs) > 1:
            return f"the weight of {what} is used {len(layer.weight.outputs)} times"
        bias = layer.bias
        if bias is not None and (reason := self._unusable(bias, "bias", maker)) is not None:
            return f"{what} {reason}"
        if layer.beta == 0:
            return f"{what} has beta = 0"
        return layer

    def _unusable(self, tensor: Variable | Constant, role: str, node: Node) -> str | None:
        """Why a weight or bias cannot be replaced, or None."""
        if not isinstance(tensor, Constant):
            return f"has a {role} that is not a constant; fold-constants may make it one"
        if tensor.input_info is not None:
            return f"has a {role} that is a graph input, whose value a caller may override"
        if tensor.dtype not in FLOAT_DTYPES:
            return f"has a {role} of type {tensor.dtype}"
        if tensor in self._outputs:
            return f"has a {role} that is an output of its graph"
        return None

    def _affine(self, node: Node, layer: _Layer) -> _Affine | str:
        """What a node does to each channel, or why it is not a scale and a shift."""
        if node.op == "BatchNormalization":
            return self._normalization(node, layer)
        operands = _split(node)
        if operands is None:
            return "has no constant operand"
        taken, operand = operands
        if operand.input_info is not None:
            return f"{operand.name!r} is a graph input, whose value a caller may override"
        if layer.node.op == "MatMul" and layer.addition is None and node.op == "Add":
            return "is the bias of a MatMul, which has none of its own"
        vector = self._vector(operand, layer)
        if vector is None:
            return (
                f"its constant of shape {list(operand.shape)} is not one value for each of the "
                f"{layer.channels} channels"
            )
        zero, one = np.zeros(layer.channels), np.ones(layer.channels)
        first = node.inputs[0] is taken
        if node.op == "Mul":
            return _Affine(vector, zero)
        if node.op == "Add":
            return _Affine(one, vector)
        if node.op == "Sub":
            return _Affine(one, -vector) if first else _Affine(-one, vector)
        if not first:
            return "divides a constant by what the layer gives"
        if not vector.all():
            return "divides by zero"
        return _Affine(1 / vector, zero)

    def _normalization(self, node: Node, layer: _Layer) -> _Affine | str:
        if any(tensor.name for tensor in node.outputs[1:]) or node.attr("training_mode", 0):
            return "is in training mode: it computes mean and variance of its input"
        if not node.attr("spatial", 1):
            return "has spatial = 0: a value for each element, not for each channel"
        parameters = node.inputs[1:5]
        for tensor in parameters:
            if not isinstance(tensor, Constant):
                return f"{tensor.name!r} is not a constant"
            if tensor.input_info is not None:
                return f"{tensor.name!r} is a graph input, whose value a caller may override"
        if any(tensor.shape != (layer.channels,) for tensor in parameters):
            return f"its parameters are not one value for each of the {layer.channels} channels"
        if not layer.is_convolution and self._rank(layer.output) != 2:
            return "its channels, axis 1, are not known to be the last axis of what it takes"
        scale, bias, mean, variance = (t.values.astype(np.float64) for t in parameters)
        spread = variance + float(node.attr("epsilon", 1e-5))
        if not (spread > 0).all():
            return "variance + epsilon is not positive"
        factor = scale / np.sqrt(spread)
        return _Affine(factor, bias - mean * factor)

    def _vector(self, operand: Constant, layer: _Layer) -> Vector | None:
        """A constant as one value a channel, shape (C,); None if it is broadcast otherwise."""
        if operand.dtype not in FLOAT_DTYPES:
            return None
        rank = len(layer.weight.shape) if layer.is_convolution else self._rank(layer.output) or 1
        if len(operand.shape) > rank:
            return None
        shape = (1,) * (rank - len(operand.shape)) + operand.shape
        axis = 1 if layer.is_convolution else rank - 1
        others = shape[:axis] + shape[axis + 1 :]
        if any(size != 1 for size in others) or shape[axis] not in (1, layer.channels):
            return None
        values = operand.values.astype(np.float64).reshape(-1)
        return np.broadcast_to(values, layer.channels)

    def _rank(self, tensor: Variable) -> int | None:
        known = self._types.of(tensor)
        return None if known is None else known.rank

    # ---- the edit

    def _fuse(self, node: Node, layer: _Layer, affine: _Affine) -> str:
        """Moves the scale and the shift into the layer and removes the node; or says why not."""
        weight = _rounded(layer.scaled_weight(affine.scale), layer.weight.dtype)
        bias = _rounded(layer.moved_bias(affine), layer.weight.dtype)
        if weight is None or bias is None:
            return f"the product does not fit into {layer.weight.dtype} or is not finite"
        if (affine.scale != 1).any():
            layer.weight.values = weight
        result = node.outputs[0]
        if layer.node.op == "MatMul" and layer.addition is None and bias.any():
            graph = node.graph
            graph.remove_node(node)
            operands: list[Variable | Constant] = [layer.output]
            operands.append(graph.add_constant(f"{result.name}_bias", bias))
            graph.add_node("Add", operands, outputs=[result], name=node.name)
            return ""
        if layer.bias is not None or bias.any():
            _set_bias(layer, bias)
        self._model.replace_uses(result, layer.output)
        node.graph.remove_node(node)
        if result in self._outputs:
            self._outputs.add(layer.output)
        return ""


def _set_bias(layer: _Layer, bias: Array) -> None:
    """Gives the layer a bias, its own if others share the present one."""
    graph, old = layer.node.graph, layer.bias
    if isinstance(old, Constant) and len(old.outputs) == 1 and old.owner is graph:
        old.values = bias
        return
    hint = old.name if old is not None else f"{layer.weight.name}_bias"
    constant = graph.add_constant(hint, bias)
    holder = layer.addition or layer.node
    if old is not None:
        holder.inputs[_position(holder, old)] = constant
    elif len(holder.inputs) > 2:
        holder.inputs[2] = constant
    else:
        holder.inputs.append(constant)


def _split(node: Node) -> tuple[Variable, Constant] | None:
    """The computed and the constant operand of a node of two, or None if it has not these."""
    if len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if isinstance(first, Constant) == isinstance(second, Constant):
        return None
    return (second, first) if isinstance(first, Constant) else (first, second)


def _is_behind_layer(tensor: Variable) -> bool:
    """Whether it is the output of a layer, or of a MatMul and the Add of a constant."""
    if not tensor.inputs or tensor.inputs[0].domain:
        return False
    maker = tensor.inputs[0]
    if maker.op in _LAYERS:
        return True
    source = _source(maker) if maker.op == "Add" else None
    return source is not None and source.op == "MatMul" and not source.domain


def _source(addition: Node) -> Node | None:
    """What makes the computed operand of a node that has a constant one."""
    operands = _split(addition)
    return operands[0].inputs[0] if operands is not None and operands[0].inputs else None


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array | None:
    """In the type of the weight; None if an element is not finite there."""
    with np.errstate(over="ignore"):
        rounded: Array = values.astype(dtype)
    return rounded if np.isfinite(rounded.astype(np.float64)).all() else None


def _position(node: Node, tensor: Variable | Constant) -> int:
    return next(index for index, taken in enumerate(node.inputs) if taken is tensor)
