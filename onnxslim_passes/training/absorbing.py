"""Affine maps of the channels behind convolutions, taken into the convolutions' weights.

With s and t a number for each output channel,

    s (W * x + b) + t = (s W) * x + (s b + t)

so that a frozen BatchNormalization, or the Mul and Add that exporters write for one, costs a few
operations on weights in place of passes over activations, forward and backward. The chain rule does
the rest: the gradient of s comes from that of s W, which is as small. Nothing is rounded into the
weights, and a scale of 0 keeps its gradient.
"""

import itertools

from onnxslim_passes.model import Constant, Node
from onnxslim_passes.training.emitter import Emitter, Tensor

__all__ = ["absorb_affine"]

_MAPS = frozenset(("BatchNormalization", "Mul", "Add"))


def absorb_affine(emit: Emitter) -> None:
    """Rewrites every Conv whose output goes into such maps only.

    Args:
        emit: a graph whose trained weights are no constants any more. Tensors that are taken by
            other nodes, or are outputs, stay.
    """
    for node in list(emit.graph.nodes):
        if node.op == "Conv" and not node.domain:
            _absorb_all(emit, node)


def _absorb_all(emit: Emitter, conv: Node) -> None:
    """Takes in one map behind a Conv after the other."""
    y = conv.outputs[0]
    weight = conv.inputs[1]
    bias = next((tensor for tensor in conv.inputs[2:] if not tensor.is_empty()), None)
    while (behind := _next(emit, y, weight)) is not None:
        factor, term = _factor_and_term(emit, behind, y)
        if factor is not None:
            spread = [-1, *itertools.repeat(1, emit.rank(weight) - 1)]
            weight = emit.mul(weight, emit.reshape(factor, spread))
            bias = None if bias is None else emit.mul(bias, factor)
        if term is not None:
            bias = term if bias is None else emit.add(bias, term)
        y = behind.outputs[0]
    if y is not conv.outputs[0]:
        made = emit.op("Conv", conv.inputs[0], weight, bias, **conv.attrs)
        emit.model.replace_uses(y, made)


def _next(emit: Emitter, y: Tensor, weight: Tensor) -> Node | None:
    """The node behind y, if it is such a map and y goes nowhere else."""
    if len(y.outputs) != 1 or y in emit.graph.outputs:
        return None
    node: Node = y.outputs[0]
    if node.graph is not emit.graph or node.domain or node.op not in _MAPS:
        return None
    others = [tensor for tensor in node.inputs if tensor is not y]
    # The gradient of a factor would need that of weights that are frozen.
    frozen = isinstance(weight, Constant)
    if frozen and not all(isinstance(tensor, Constant) for tensor in others):
        return None
    if node.op == "BatchNormalization":
        same_type = all(emit.elem_type(tensor) == emit.elem_type(y) for tensor in others)
        fits = node.inputs[0] is y and same_type and not node.attr("training_mode", 0)
    else:
        fits = len(others) == 1 and _is_by_channel(emit, others[0], y)
    return node if fits else None


def _factor_and_term(emit: Emitter, node: Node, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What a map multiplies each channel of y by and what it adds, of rank 1; None for neither."""
    others = [tensor for tensor in node.inputs if tensor is not y]
    if node.op != "BatchNormalization":
        flat = emit.reshape(others[0], [-1])
        return (flat, None) if node.op == "Mul" else (None, flat)
    scale, shift, mean, variance = others
    root = emit.op("Sqrt", emit.shift(variance, node.attr("epsilon", 1e-5)))
    factor = emit.div(scale, root)
    return factor, emit.sub(shift, emit.mul(mean, factor))


def _is_by_channel(emit: Emitter, tensor: Tensor, y: Tensor) -> bool:
    """Whether a tensor broadcasts to (N, C, ...) with a number for each channel."""
    if not emit.has_shape(tensor) or not emit.has_shape(y):
        return False
    wanted = (emit.shape(y)[1], *itertools.repeat(1, emit.rank(y) - 2))
    return emit.shape(tensor) in (wanted, (1, *wanted))
