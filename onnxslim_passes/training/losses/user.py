"""A loss of the user's: `file.py:function` returns it as an ONNX model.

The model's inputs are called as tensors of the network (outputs, or any inner tensor), and one may
be called `labels`. Its first output is the loss, a single float; a second one, if there is one, is
a metric that is shown beside it, where lower is better.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxslim_passes.errors import UsageError, unknown_name
from onnxslim_passes.evaluation.functions import UserFunction
from onnxslim_passes.model import Model, Variable
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.losses.base import LabelSpec, Loss, Measure, mean
from onnxslim_passes.training.losses.embedding import embed
from onnxslim_passes.training.lowering import lower
from onnxslim_passes.training.shapes import Tensor

__all__ = ["user_loss"]

LABELS = "labels"


def user_loss(emit: Emitter, spec: str, labels: str) -> Loss:
    """The loss that a function of the user's returns.

    Args:
        emit: the graph with the network.
        spec: `file.py:function`, called without arguments; returns an `onnx.ModelProto`, an
            `onnx.GraphProto` or the path of a model file.
        labels: name for the graph input that the labels are fed to.

    Raises:
        UsageError: the file, the function, or what it returns is not as expected.
        UnknownNameError: an input of the loss is no tensor of the network; with the nearest name.
    """
    core = lower(_as_model(UserFunction(spec, UsageError)(), spec)).model
    core.at_least_opset(emit.model.opset)
    tensors = _tensors(emit)
    inputs: dict[str, Tensor] = {}
    label_spec = None
    for tensor in core.graph.inputs:
        name = str(tensor.name)
        if name == LABELS and name not in tensors:
            label_spec = _label_spec(emit, tensor, labels, spec)
            inputs[name] = emit.input(labels, np.dtype(label_spec.dtype), label_spec.shape)
        elif name in tensors:
            inputs[name] = tensors[name]
        else:
            raise unknown_name(f"tensor of the network as input of {spec}:", name, tensors)
    names = [str(tensor.name) for tensor in core.graph.outputs]
    found = embed(emit, core, prefix="user/", inputs=inputs)
    for name in names[:2]:
        shape = emit.shape(found[name])
        if not emit.is_float(found[name]) or any(size != 1 for size in shape):
            raise UsageError(f"{spec}: output {name!r} has shape {shape}; expected a single float.")
    value = mean(emit, found[names[0]])
    metric = mean(emit, found[names[1]]) if len(names) > 1 else value
    label = names[1] if len(names) > 1 else names[0]
    return Loss(value, value, Measure(label, metric, False), label_spec)


def _as_model(returned: Any, spec: str) -> Model:
    if isinstance(returned, str | Path):
        if not Path(returned).is_file():
            raise UsageError(
                f"{spec}: returned the path {str(returned)!r}, where there is no file."
            )
        returned = onnx.load(returned)
    if isinstance(returned, onnx.GraphProto):
        returned = helper.make_model(returned)
    if not isinstance(returned, onnx.ModelProto) or not returned.graph.output:
        raise UsageError(
            f"{spec}: returned {type(returned).__name__}, expected an onnx.ModelProto with the "
            "loss as its first output."
        )
    return Model.from_proto(returned)


def _tensors(emit: Emitter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {str(tensor.name): tensor for tensor in emit.graph.inputs}
    for node in emit.graph.nodes:
        tensors.update({str(t.name): t for t in node.outputs if not t.is_empty()})
    return tensors


def _label_spec(emit: Emitter, tensor: Variable, name: str, spec: str) -> LabelSpec:
    if tensor.dtype is None or tensor.shape is None:
        raise UsageError(f"{spec}: input 'labels' must declare its element type and shape.")
    batch = next((emit.shape(t)[0] for t in emit.graph.inputs if emit.shape(t)), "N")
    shape = tuple(
        size if isinstance(size, int) else batch if axis == 0 else f"label_{axis}"
        for axis, size in enumerate(tensor.shape)
    )
    return LabelSpec(name, str(tensor.dtype), shape, None, "what the loss takes")
