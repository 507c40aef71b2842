"""What rounding one activation to 8 bits does to the outputs, for many activations.

One session serves all: each activation x becomes x + flag * (rounded(x) - x), with a flag of its
own as input, and a run for each flag shows the effect.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from onnxslim_passes.calibration import Samples
from onnxslim_passes.evaluation.fidelity import OutputSums
from onnxslim_passes.model import Model, Node, Variable
from onnxslim_passes.passes.base import Progress
from onnxslim_passes.runtime import Session, open_session

FEEDS = 2
"""Feeds that effects are measured on: they are told apart by factors, not by percents."""

_DYNAMIC_OPSET = 11  # the first with DynamicQuantizeLinear


def rounding_effects(
    model: Model, tensors: Sequence[str], samples: Samples, *, progress: Progress
) -> dict[str, float]:
    """The SQNR in dB of the worst float output with one tensor in uint8, by the tensor's name.

    Args:
        model: stays as it is.
        tensors: names of float32 tensors of the main graph that are made by nodes or inputs.
        samples: a few feeds, spread over all, are used.
        progress: is shown the tensors.

    Raises:
        UnsupportedModelError: the model cannot be brought to an opset with uint8 rounding.
        RuntimeRefusedError: it does not run.
    """
    probe, flags = _probe(model, tensors)
    with open_session(probe) as session:
        feeds = list(samples.feeds(session.inputs[: -len(flags)], most=FEEDS))
        off = dict.fromkeys(flags, np.zeros((), np.float32))
        expected = [session.run(dict(feed) | off) for feed in feeds]
        effects = {}
        pairs = list(zip(tensors, flags, strict=True))
        for name, flag in progress.track(pairs, "Measuring effects", total=len(pairs)):
            on = off | {flag: np.ones((), np.float32)}
            effects[name] = _worst(session, [dict(feed) | on for feed in feeds], expected)
    return effects


def _worst(
    session: Session, feeds: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]
) -> float:
    sums = {spec.name: OutputSums(spec.name) for spec in session.outputs}
    for feed, reference in zip(feeds, expected, strict=True):
        for name, array in session.run(feed).items():
            sums[name].update(reference[name], array)
    figures = [output.result().sqnr_db for output in sums.values()]
    return min((figure for figure in figures if not math.isnan(figure)), default=math.inf)


def _probe(model: Model, tensors: Sequence[str]) -> tuple[Model, list[str]]:
    """A copy with a flag for each tensor, and the names of the flags, in order."""
    copy = model.copy()
    copy.at_least_opset(_DYNAMIC_OPSET)
    made = [tensor for node in copy.graph.nodes for tensor in node.outputs]
    known = {str(tensor.name): tensor for tensor in (*copy.graph.inputs, *made)}
    flags = [_add_flag(copy, known[name]) for name in tensors]
    copy.graph.inputs = [*copy.graph.inputs, *flags]
    copy.graph.declared_inputs = [*copy.graph.declared_inputs, *flags]
    return copy, [str(flag.name) for flag in flags]


def _add_flag(copy: Model, tensor: Variable) -> Variable:
    graph = copy.graph
    takers: list[Node] = list(dict.fromkeys(tensor.outputs))
    name = graph.fresh_name("flag")
    flag = Variable(name, helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    quantized = graph.add_node(
        "DynamicQuantizeLinear", [tensor], outputs=["codes", "scale", "zero_point"]
    )
    # In plain arithmetic: the newest opset's DequantizeLinear can be ahead of the runtime.
    codes, scale, zero_point = quantized.outputs
    numbers = [
        graph.add_node("Cast", [integers], attrs={"to": TensorProto.FLOAT}).outputs[0]
        for integers in (codes, zero_point)
    ]
    steps = graph.add_node("Sub", numbers).outputs[0]
    rounded = graph.add_node("Mul", [steps, scale]).outputs[0]
    error = graph.add_node("Sub", [rounded, tensor]).outputs[0]
    flagged = graph.add_node("Mul", [error, flag]).outputs[0]
    shifted = graph.add_node("Add", [tensor, flagged]).outputs[0]
    products = [node for node in takers if node.op in ("MatMul", "Gemm")]
    copy.replace_uses(tensor, shifted, only=products)
    return flag
