"""The calibration run: one reading of the samples, the range of every tensor asked for.

Observers that need only the smallest and largest value of each sample get them from reductions
appended to the graph, so that activations never leave it. The others are shown the values, a
segment of the model at a time (`segments.py`). Either way memory does not grow with the samples.

ONNX Runtime's ReduceMin and ReduceMax pass over NaN, so a sum is taken too, which does not. Where
it overflows (attention masks hold -3.4e38), the sum of 0 * x, exact but slower, takes its place.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from onnxslim_passes.calibration.cache import RangeCache
from onnxslim_passes.calibration.observers import (
    MinMax,
    Observer,
    ObserverOptions,
    observer_named,
)
from onnxslim_passes.calibration.ranges import Progress, TensorRange
from onnxslim_passes.calibration.samples import Feed, Samples
from onnxslim_passes.calibration.segments import main_tensors, measurable, shown, visit_values
from onnxslim_passes.errors import SamplesError
from onnxslim_passes.model import Graph, Model, Types, Variable
from onnxslim_passes.runtime import Array, Session, open_session

__all__ = ["Progress", "TensorRange", "collect_ranges", "main_tensors"]

_STATISTICS = 4  # lowest, highest, sum, shape
_AXES_INPUT_OPSET = 18  # the first with ReduceMin's axes as an input


def collect_ranges(
    model: Model,
    tensors: Sequence[Variable],
    samples: Samples,
    *,
    observer: str = "min-max",
    options: ObserverOptions | None = None,
    progress: Progress | None = None,
    strict: bool = True,
    most: int | None = None,
    cache: RangeCache | None = None,
) -> dict[str, TensorRange]:
    """Runs the model on the samples once.

    Args:
        model: Stays as it is.
        tensors: Numeric tensors of the main graph, graph inputs included.
        samples: The data.
        observer: How a range is chosen; a name in `observers.OBSERVERS`.
        options: What the observer is told; the defaults if None.
        progress: Is shown the feeds.
        strict: Raise for a tensor that becomes NaN or infinite. Else its `finite` is False, and the
            caller may leave it alone with a reason: some models mask attention with infinities.
        most: At most so many feeds, evenly spread; None: all of them. The cache is for all.
        cache: Is asked first, and told what was found.

    Returns:
        The range of each tensor by its name; the same for any grouping of samples into feeds, as
        far as the model treats samples alike. For "moving-average", a tensor whose first axis is as
        long as that of all inputs counts as having a row a sample; others as one sample a feed.

    Raises:
        UnknownNameError: There is no such observer.
        SamplesError: The data does not fit the model, or a tensor became NaN or infinite.
        RuntimeRefusedError: The model does not run on the data.
        UnsupportedModelError: A tensor is in a body, or holds no numbers.
    """
    kind, settings = observer_named(observer), options or ObserverOptions()
    if not tensors:
        return {}
    types = model.types()
    chosen = measurable(model, tensors, types)
    key = None
    if most is not None:
        cache = None  # a part of the samples has ranges of its own
    if cache is not None:
        key = cache.key(model, chosen, samples, observer, settings)
        known = cache.load(key)
        if known is not None and (all(r.finite for r in known.values()) or not strict):
            return known
    found = {name: _Found(kind.from_options(settings)) for name in chosen}
    if kind.needs_values:
        _show_values(model, tensors, samples, found, progress, strict=strict, most=most)
    else:
        rows = kind is not MinMax
        reduced = _Reduced(model, chosen, types, rows=rows)
        _reduce(reduced, samples, found, progress, strict=strict, most=most)
    ranges = {name: seen.result() for name, seen in found.items()}
    if cache is not None and key is not None:
        cache.store(key, ranges)
    return ranges


def _show_values(
    model: Model,
    tensors: Sequence[Variable],
    samples: Samples,
    found: Mapping[str, "_Found"],
    progress: Progress | None,
    *,
    strict: bool,
    most: int | None,
) -> None:
    """Shows all values to the observers."""

    def visit(name: str, values: Array, feed: Feed) -> None:
        finite = bool(_is_finite(values))
        if not finite and strict:
            raise _non_finite(model, name, feed, samples)
        found[name].update(values, values.shape, finite)

    visit_values(model, tensors, samples, visit, progress=progress, most=most)


def _is_finite(values: Array) -> bool:
    """Whether no value is NaN or infinite; NumPy's extremes pass NaN on."""
    return not values.size or all(
        math.isfinite(float(extreme)) for extreme in (values.min(), values.max())
    )


def _reduce(
    reduced: "_Reduced",
    samples: Samples,
    found: Mapping[str, "_Found"],
    progress: Progress | None,
    *,
    strict: bool,
    most: int | None,
) -> None:
    """Shows the extremes, found in the graph, to the observers."""
    overflowing: set[str] = set()
    session = reduced.open(overflowing)
    for feed in shown(samples.feeds(session.inputs, most=most), samples, progress):
        values = _measure(session, feed, found)
        suspects = {n for n, v in values.items() if not np.isfinite(v[2])} - overflowing
        if suspects:
            overflowing |= suspects
            session.close()
            session = reduced.open(overflowing)
            values = _measure(session, feed, found)
        batch = _batch_length(feed)
        for name, seen in found.items():
            low, high, total, shape = values[name]
            finite = bool(np.isfinite(total))
            size = math.prod(int(d) for d in shape)
            if size and not finite and strict:
                raise _non_finite(reduced.model, name, feed, samples)
            seen.update(_extremes(low, high, batch), [int(d) for d in shape], finite or not size)
    session.close()


def _batch_length(feed: Feed) -> int | None:
    """The length of the first axis, if all inputs of a feed share it."""
    lengths = {np.shape(array)[0] for array in feed.values() if np.ndim(array)}
    return lengths.pop() if len(lengths) == 1 else None


def _extremes(low: Any, high: Any, batch: int | None) -> Array:
    """Shape (samples, 2): the extremes of each sample, if the tensor has a row for each."""
    if np.ndim(low) and len(low) == batch:
        return np.stack([low, high], axis=1)
    return np.array([[np.min(low, initial=np.inf), np.max(high, initial=-np.inf)]])


def _measure(session: Session, feed: Feed, names: Iterable[str]) -> dict[str, list[Any]]:
    """The statistics of each tensor in one run."""
    values = list(session.run(feed).values())
    return {n: values[_STATISTICS * i : _STATISTICS * (i + 1)] for i, n in enumerate(names)}


class _Found:
    """The range of one tensor so far."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._seen = self._rank = 0
        self._finite = True

    def update(self, values: Array, shape: Sequence[int], finite: bool) -> None:
        """Takes in one run: what the observer sees, and the tensor's own shape."""
        self._rank = len(shape)
        size = math.prod(shape)
        self._seen += size
        self._finite &= finite
        if size and finite:
            self._observer.update(values)

    def result(self) -> TensorRange:
        low, high = self._observer.range()
        return TensorRange(low, high, self._seen, self._rank, self._finite)


class _Reduced:
    """The model with the statistics of some tensors as its only outputs.

    Attributes:
        model: The model itself.
    """

    def __init__(
        self, model: Model, chosen: Mapping[str, Variable], types: Types, *, rows: bool
    ) -> None:
        self.model = model
        self._kinds = {
            name: (_reduced_type(types, tensor), rows and _has_axes(types, tensor))
            for name, tensor in chosen.items()
        }

    def open(self, overflowing: Set[str]) -> Session:
        """A session that returns `_STATISTICS` values a tensor, one tensor after the other.

        Args:
            overflowing: Tensors whose sums overflow.
        """
        copy = self.model.copy()
        by_name = main_tensors(copy.graph)
        outputs: list[Variable] = []
        for name, (elem_type, by_rows) in self._kinds.items():
            axes_input = copy.opset >= _AXES_INPUT_OPSET
            statistics = _Statistics(copy.graph, elem_type, axes_input)
            outputs += statistics.of(by_name[name], by_rows, name in overflowing)
        copy.graph.outputs = outputs
        copy.remove_unused()
        return open_session(copy, lean=True)


def _has_axes(types: Types, tensor: Variable) -> bool:
    known = types.of(tensor)
    return known is not None and bool(known.rank)


def _reduced_type(types: Types, tensor: Variable) -> int:
    """The ONNX type that the statistics of a tensor are computed in."""
    known = types.of(tensor)
    double, single = int(TensorProto.DOUBLE), int(TensorProto.FLOAT)
    return double if known is not None and known.elem_type == double else single


class _Statistics:
    """Appends the statistics of tensors of one type to a graph."""

    def __init__(self, graph: Graph, elem_type: int, axes_input: bool) -> None:
        self._graph = graph
        self._elem_type = elem_type
        self._axes_input = axes_input

    def of(self, tensor: Variable, by_rows: bool, overflowing: bool) -> list[Variable]:
        """Lowest and highest of all or of each row, the sum of all, the shape."""
        # Cast always: bfloat16 and integers have no kernels; of a float32 ONNX Runtime drops it.
        value = self._add("Cast", tensor, {"to": self._elem_type})
        rows = self._add("Flatten", value, {"axis": 1}) if by_rows else value
        summed = value
        if overflowing:
            dtype = helper.tensor_dtype_to_np_dtype(self._elem_type)
            zero = self._graph.add_constant("calibration_zero", np.zeros((), dtype))
            summed = self._graph.add_node("Mul", [value, zero]).outputs[0]
        made = [
            self._extreme("ReduceMin", rows, by_rows),
            self._extreme("ReduceMax", rows, by_rows),
            self._add("ReduceSum", summed, {"keepdims": 0}),
        ]
        for reduced in made:
            _declare(reduced, self._elem_type, None)
        shape = self._add("Shape", tensor, {})
        _declare(shape, TensorProto.INT64, [None])
        return [*made, shape]

    def _add(self, op: str, tensor: Variable, attrs: dict[str, Any]) -> Variable:
        made: Variable = self._graph.add_node(op, [tensor], attrs=attrs).outputs[0]
        return made

    def _extreme(self, op: str, value: Variable, by_rows: bool) -> Variable:
        if not by_rows:
            return self._add(op, value, {"keepdims": 0})
        if not self._axes_input:
            return self._add(op, value, {"keepdims": 0, "axes": [1]})
        axes = self._graph.add_constant("calibration_axes", np.array([1], np.int64))
        node = self._graph.add_node(op, [value, axes], attrs={"keepdims": 0})
        made: Variable = node.outputs[0]
        return made


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
