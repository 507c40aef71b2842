"""The calibration run: one reading of the samples, the range of every tensor asked for.

The statistics are computed in the graph, by reductions appended to it, so that a run returns four
numbers a tensor and activations are never held: memory does not grow with the samples.
ONNX Runtime's ReduceMin and ReduceMax pass over NaN, so a sum is taken too, which does not. Where
it overflows (attention masks hold -3.4e38), the sum of 0 * x, exact but slower, takes its place.
"""

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from onnx import TensorProto, helper

from onnxslim_passes.calibration.observers import MinMax
from onnxslim_passes.calibration.samples import Feed, Samples
from onnxslim_passes.errors import SamplesError, UnsupportedModelError
from onnxslim_passes.model import Graph, Model, Types, Variable
from onnxslim_passes.runtime import Session, open_session

Item = TypeVar("Item")

_STATISTICS = 4  # lowest, highest, sum, shape


class Progress(Protocol):
    """Something that shows how far a loop has come."""

    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterable[Item]:
        """The same items."""
        ...


@dataclass(frozen=True)
class TensorRange:
    """What one tensor held.

    Attributes:
        lo: Its smallest value; NaN if it was empty in every run.
        hi: Its largest value; NaN likewise.
        seen: How many elements were looked at.
        rank: Its number of axes.
        finite: False if it held NaN or infinity; then there is no use in `lo` and `hi`.
    """

    lo: float
    hi: float
    seen: int
    rank: int
    finite: bool = True


def collect_ranges(
    model: Model,
    tensors: Sequence[Variable],
    samples: Samples,
    *,
    progress: Progress | None = None,
    strict: bool = True,
) -> dict[str, TensorRange]:
    """Runs the model on all samples once.

    Args:
        model: Stays as it is.
        tensors: Numeric tensors of the main graph, graph inputs included.
        samples: The data.
        progress: Is shown the feeds.
        strict: Raise for a tensor that becomes NaN or infinite. Else its `finite` is False, and the
            caller may leave it alone with a reason: some models mask attention with infinities.

    Returns:
        The range of each tensor by its name; the same for any grouping of samples into feeds, as
        far as the model treats samples alike.

    Raises:
        SamplesError: The data does not fit the model, or a tensor became NaN or infinite.
        RuntimeRefusedError: The model does not run on the data.
        UnsupportedModelError: A tensor holds no numbers.
    """
    if not tensors:
        return {}
    found = {str(t.name): _Found() for t in tensors}
    overflowing: set[str] = set()
    session = _measuring(model, tensors, overflowing)
    feeds: Iterable[Feed] = samples.feeds(session.inputs)
    if progress is not None:
        feeds = progress.track(feeds, "Calibrating", total=samples.feed_count)
    for feed in feeds:
        values = _measure(session, feed, found)
        suspects = {n for n, v in values.items() if not np.isfinite(v[2])} - overflowing
        if suspects:
            overflowing |= suspects
            session.close()
            session = _measuring(model, tensors, overflowing)
            values = _measure(session, feed, found)
        for name, seen in found.items():
            if not seen.update(*values[name]) and strict:
                raise _non_finite(model, name, feed, samples)
    session.close()
    return {name: seen.result() for name, seen in found.items()}


def _measuring(model: Model, tensors: Sequence[Variable], overflowing: Set[str]) -> Session:
    """A session whose outputs are the statistics of the tensors, one tensor after the other."""
    return open_session(_instrumented(model, tensors, overflowing), lean=True)


def _measure(session: Session, feed: Feed, names: Iterable[str]) -> dict[str, list[Any]]:
    """The statistics of each tensor in one run."""
    values = list(session.run(feed).values())
    return {n: values[_STATISTICS * i : _STATISTICS * (i + 1)] for i, n in enumerate(names)}


class _Found:
    """The range of one tensor so far."""

    def __init__(self) -> None:
        self._observer = MinMax()
        self._seen = self._rank = 0
        self._finite = True

    def update(self, low: Any, high: Any, total: Any, shape: Any) -> bool:
        """Takes in one run; False if a value was not finite."""
        size = math.prod(int(d) for d in shape)
        self._rank = len(shape)
        if size == 0:
            return True  # the reductions of nothing are infinite, or undefined
        self._seen += size
        finite = bool(np.isfinite(total))
        self._finite &= finite
        if finite:
            self._observer.update(np.array([low, high]))
        return finite

    def result(self) -> TensorRange:
        low, high = self._observer.range()
        return TensorRange(low, high, self._seen, self._rank, self._finite)


def _instrumented(model: Model, tensors: Sequence[Variable], overflowing: Set[str]) -> Model:
    """A copy whose only outputs are four statistics a tensor."""
    types = model.types()
    copy = model.copy()
    by_name = main_tensors(copy.graph)
    outputs: list[Variable] = []
    for name, tensor in {str(t.name): t for t in tensors}.items():
        if name not in by_name:
            raise UnsupportedModelError(
                f"Tensor {name!r} cannot be measured: it is not in the main graph."
            )
        elem_type = _reduced_type(types, tensor)
        outputs += _add_statistics(copy.graph, by_name[name], elem_type, name in overflowing)
    copy.graph.outputs = outputs
    copy.remove_unused()
    return copy


def main_tensors(graph: Graph) -> dict[str, Variable]:
    """The inputs and the node outputs of a graph, without its bodies, by name."""
    made = [t for node in graph.nodes for t in node.outputs if not t.is_empty()]
    return {t.name: t for t in (*graph.inputs, *made) if isinstance(t, Variable)}


def _reduced_type(types: Types, tensor: Variable) -> int:
    """The ONNX type that the statistics of a tensor are computed in."""
    known = types.of(tensor)
    elem_type = int(known.elem_type) if known is not None else 0
    if elem_type in (TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        raise UnsupportedModelError(
            f"Tensor {tensor.name!r} cannot be measured: it holds "
            f"{helper.tensor_dtype_to_string(elem_type).removeprefix('TensorProto.').lower()}."
        )
    double, single = int(TensorProto.DOUBLE), int(TensorProto.FLOAT)
    return double if elem_type == double else single


def _add_statistics(
    graph: Graph, tensor: Variable, elem_type: int, overflowing: bool
) -> list[Variable]:
    """Appends the statistics over all axes of one tensor."""
    # Cast always: bfloat16 and integers have no kernels; of a float32 ONNX Runtime drops it.
    value = graph.add_node("Cast", [tensor], attrs={"to": elem_type}).outputs[0]
    summed = value
    if overflowing:
        dtype = helper.tensor_dtype_to_np_dtype(elem_type)
        zero = graph.add_constant("calibration_zero", np.zeros((), dtype))
        summed = graph.add_node("Mul", [value, zero]).outputs[0]
    over_all = {"keepdims": 0}
    made = [
        graph.add_node("ReduceMin", [value], attrs=over_all),
        graph.add_node("ReduceMax", [value], attrs=over_all),
        graph.add_node("ReduceSum", [summed], attrs=over_all),
        graph.add_node("Shape", [tensor]),
    ]
    for node in made:
        is_shape = node.op == "Shape"
        _declare(
            node.outputs[0], TensorProto.INT64 if is_shape else elem_type, [None] * int(is_shape)
        )
    return [node.outputs[0] for node in made]


def _declare(tensor: Variable, elem_type: int, shape: Sequence[int | None] | None) -> None:
    """Gives a new tensor the type that a graph output must have."""
    tensor.info = helper.make_tensor_value_info(tensor.name, elem_type, shape)
    tensor.dtype = helper.tensor_dtype_to_np_dtype(elem_type)


def _non_finite(model: Model, name: str, feed: Feed, samples: Samples) -> SamplesError:
    """The error for a tensor with NaN or infinity: runs the model again and counts them."""
    copy = model.copy()
    tensor = main_tensors(copy.graph)[name]
    cast = copy.graph.add_node("Cast", [tensor], attrs={"to": TensorProto.DOUBLE})
    maker = next((f"made by node {n.where!r} ({n.op})" for n in tensor.inputs), "a graph input")
    _declare(cast.outputs[0], TensorProto.DOUBLE, None)
    copy.graph.outputs = [cast.outputs[0]]
    copy.remove_unused()
    with open_session(copy) as session:
        values = session.run(feed)[session.outputs[0].name]
    bad = {"NaN": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}
    counts = " and ".join(f"{count} {kind}" for kind, count in bad.items() if count)
    return SamplesError(
        f"{samples.name}: tensor {name!r}, {maker}, holds {counts} of {values.size} values and so "
        "has no range. Check the data that the model is fed, or leave the node out."
    )
