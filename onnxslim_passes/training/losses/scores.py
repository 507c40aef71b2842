"""The tensor that a loss is on: the output, or the logits in front of its Softmax or Sigmoid.

A loss on probabilities loses digits where they come near 0 and 1, and its gradient vanishes there.
A final Softmax, LogSoftmax or Sigmoid is therefore passed by, and its operation becomes part of the
loss, where it is stable. Where the first outputs are no numbers, as scikit-learn's exporter writes
class labels and maps, the scores behind ArgMax, TopK or ZipMap are meant, and behind QuantizeLinear
the numbers before they were rounded.
"""

from dataclasses import dataclass
from typing import Literal

from onnxslim_passes.errors import UnsupportedModelError, unknown_name
from onnxslim_passes.model import Constant, Graph, Node, Variable
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.shapes import Tensor

__all__ = ["Scores", "class_axis", "find_output", "find_scores"]

Kind = Literal["logits", "softmax", "sigmoid"]

_PASSED_BY = frozenset(("Identity", "Cast", "Dropout"))
# Operators that make classes, maps or integers of scores, and those that only carry them on.
_CHOICES = frozenset(("ArgMax", "TopK", "ZipMap", "QuantizeLinear"))
_CARRIERS = {"ArrayFeatureExtractor": 1, "Cast": 0, "Reshape": 0, "Squeeze": 0, "Identity": 0}
_ACTIVATIONS: dict[str, Kind] = {
    "Softmax": "softmax",
    "LogSoftmax": "softmax",
    "Sigmoid": "sigmoid",
}


@dataclass(frozen=True)
class Scores:
    """What a loss is on.

    Attributes:
        output: the tensor that was asked for.
        tensor: the logits, or `output` itself.
        kind: the activation that was passed by; "logits" if there was none.
        axis: of that Softmax, >= 0; None if there was none.
    """

    output: Tensor
    tensor: Tensor
    kind: Kind
    axis: int | None = None

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """What is said of it."""
        if self.tensor is self.output:
            return ()
        return (
            Decision(
                where=str(self.output.name),
                taken=True,
                reason=f"the loss is on {self.tensor.name!r}, the logits in front of the final "
                f"{self.kind}: stable, and the gradient does not vanish",
            ),
        )


def find_output(graph: Graph, name: str | None) -> Tensor:
    """The tensor called `name`, or the first output of numbers.

    Raises:
        UnknownNameError: there is no such tensor; with the nearest name.
        UnsupportedModelError: no output is, or is chosen from, a tensor of floats.
    """
    if name is not None:
        return _named(graph, name)
    for output in graph.outputs:
        found = _numbers_behind(output)
        if found is not None:
            return found
    listed = ", ".join(repr(str(tensor.name)) for tensor in graph.outputs)
    raise UnsupportedModelError(
        f"None of the outputs ({listed}) is a tensor of floating-point numbers; name the tensor "
        "that the loss is on with output (--output)."
    )


def _named(graph: Graph, name: str) -> Tensor:
    tensors: dict[str, Tensor] = {str(tensor.name): tensor for tensor in graph.outputs}
    for node in graph.nodes:
        for tensor in node.outputs:
            if not tensor.is_empty():
                tensors.setdefault(str(tensor.name), tensor)
    if name not in tensors:
        raise unknown_name("tensor in `output`:", name, tensors)
    return tensors[name]


def _numbers_behind(tensor: Tensor) -> Tensor | None:
    """The tensor itself if it holds floats, or the scores that it was made of."""
    if isinstance(tensor, Constant):
        return None
    if tensor.dtype is not None and tensor.dtype.kind == "f":
        return tensor
    while tensor.inputs:
        node: Node = tensor.inputs[0]
        if node.op in _CHOICES:
            scores: Tensor = node.inputs[0]
            return scores if isinstance(scores, Variable) else None
        if node.op not in _CARRIERS:
            return None
        tensor = node.inputs[_CARRIERS[node.op]]
    return None


def find_scores(emit: Emitter, output: Tensor) -> Scores:
    """Where the loss on `output` attaches: its logits if it ends in a known activation."""
    tensor = output
    while isinstance(tensor, Variable) and tensor.inputs:
        node: Node = tensor.inputs[0]
        coerced = _coerced_softmax(emit, tensor)
        if coerced is not None:
            return Scores(output, coerced, "softmax", emit.rank(coerced) - 1)
        if node.domain in ("", "ai.onnx") and node.op in _ACTIVATIONS:
            kind = _ACTIVATIONS[node.op]
            axis = None
            if kind == "softmax":
                axis = int(node.attr("axis", -1)) % emit.rank(tensor)
            return Scores(output, node.inputs[0], kind, axis)
        if node.op not in _PASSED_BY or not emit.is_float(node.inputs[0]):
            break
        tensor = node.inputs[0]
    return Scores(output, output, "logits")


def _coerced_softmax(emit: Emitter, tensor: Variable) -> Tensor | None:
    """The logits of a Softmax over the last axis as opsets before 13 have it, or None.

    Converted to a newer opset it stands between a Flatten and a Reshape.
    """
    node: Node = tensor.inputs[0]
    inner = node.inputs[0].inputs[0] if node.op == "Reshape" and node.inputs[0].inputs else None
    if inner is None or inner.op not in ("Softmax", "LogSoftmax") or not inner.inputs[0].inputs:
        return None
    flatten: Node = inner.inputs[0].inputs[0]
    if flatten.op != "Flatten":
        return None
    logits: Tensor = flatten.inputs[0]
    last = emit.rank(logits) - 1
    is_last = int(flatten.attr("axis", 1)) in (last, -1) and inner.attr("axis", -1) in (-1, 1)
    return logits if is_last and emit.shape(logits) == emit.shape(tensor) else None


def class_axis(emit: Emitter, scores: Scores, wanted: int | None) -> int:
    """The axis along which the classes are, >= 0.

    Raises:
        UnsupportedModelError: the tensor has no such axis.
    """
    rank = emit.rank(scores.tensor)
    if wanted is not None:
        if not -rank <= wanted < rank:
            raise UnsupportedModelError(
                f"{scores.output.name!r} has {rank} axes, so that class_axis={wanted} is none of "
                "them."
            )
        return wanted % rank
    if rank == 0:
        raise UnsupportedModelError(
            f"{scores.output.name!r} is a single number; a loss on classes needs a score for each."
        )
    if scores.axis is not None:
        return scores.axis
    return 1 if rank in (2, 4, 5) else rank - 1
