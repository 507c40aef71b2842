"""Statistics of each channel of a tensor over all samples, for passes that move or mend scales.

They are reduced in the graph and summed up in float64 between feeds, so that memory does not grow
with the samples. The grouping of samples changes means by float32's rounding only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from onnxslim_passes.calibration.ranges import Progress
from onnxslim_passes.calibration.samples import Samples
from onnxslim_passes.calibration.segments import main_tensors, measurable, shown
from onnxslim_passes.errors import SamplesError, UnsupportedModelError
from onnxslim_passes.model import Graph, Model, Variable
from onnxslim_passes.runtime import Session, open_session

Floats = npt.NDArray[np.float64]

_FIELDS = 5  # min, max, sum, sum of squares, shape
_AXES_INPUT_OPSET = 18  # of ReduceMin, ReduceMax and ReduceSumSquare; ReduceSum's is older
_SUM_AXES_INPUT_OPSET = 13


@dataclass(frozen=True)
class ChannelStatistics:
    """What the channels of one tensor held; arrays are float64 of shape (C,), C channels.

    Attributes:
        axis: The channel axis, counted from 0.
        seen: Values looked at in each channel; with 0 the arrays are empty or NaN.
        min: Smallest values.
        max: Largest values.
        mean: Means.
        second_moment: Means of the squares.
    """

    axis: int
    seen: int
    min: Floats
    max: Floats
    mean: Floats
    second_moment: Floats

    @property
    def absmax(self) -> Floats:
        """Largest magnitudes."""
        return np.asarray(np.maximum(np.abs(self.min), np.abs(self.max)))

    @property
    def variance(self) -> Floats:
        """Variances, 0 or more."""
        return np.asarray(np.maximum(self.second_moment - self.mean**2, 0.0))


def collect_statistics(
    model: Model,
    tensors: Sequence[Variable],
    samples: Samples,
    *,
    axis: int | Mapping[str, int] = 1,
    progress: Progress | None = None,
    strict: bool = True,
    most: int | None = None,
) -> dict[str, ChannelStatistics]:
    """Runs the model on the samples once.

    Args:
        model: Stays as it is.
        tensors: Numeric tensors of the main graph, graph inputs included, of known rank.
        samples: The data; the number of channels must be the same in every feed.
        axis: The channel axis of all tensors, or of each by name; negative ones count from the end.
        progress: Is shown the feeds.
        strict: Raise for a tensor that becomes NaN or infinite. Else it is left out of the result.
        most: Feeds to look at, spread over the samples; all by default.

    Raises:
        SamplesError: The data does not fit the model, a tensor became NaN or infinite, or has more
            channels in one feed than in another.
        RuntimeRefusedError: The model does not run on the data.
        UnsupportedModelError: A tensor is in a body, holds no numbers, or lacks the axis.
    """
    if not tensors:
        return {}
    found = {
        name: _Sums(name, place, rank)
        for name, (place, rank) in _places(model, tensors, axis).items()
    }
    with _reduced(model, found) as session:
        for feed in shown(samples.feeds(session.inputs, most=most), samples, progress):
            values = list(session.run(feed).values())
            for index, sums in enumerate(found.values()):
                sums.update(values[_FIELDS * index : _FIELDS * (index + 1)], samples, strict)
    return {name: sums.result() for name, sums in found.items() if sums.finite}


def _places(
    model: Model, tensors: Sequence[Variable], axis: int | Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """The channel axis, counted from 0, and the rank of each tensor."""
    types = model.types()
    places = {}
    for name, tensor in measurable(model, tensors, types).items():
        wanted = axis if isinstance(axis, int) else axis[name]
        known = types.of(tensor)
        rank = known.rank if known is not None else None
        if rank is None or not -rank <= wanted < rank:
            described = "an unknown number of" if rank is None else str(rank)
            raise UnsupportedModelError(
                f"Tensor {name!r} has {described} axes, so that axis {wanted} cannot be its "
                "channels; choose another axis or leave the tensor out."
            )
        places[name] = (wanted % rank, rank)
    return places


class _Sums:
    """The statistics of one tensor so far."""

    def __init__(self, name: str, axis: int, rank: int) -> None:
        self.name = name
        self.axis = axis
        self.others = [a for a in range(rank) if a != axis]
        self.finite = True
        self._seen = 0
        self._rows: Floats | None = None  # min, max, sum, sum of squares; shape (4, C)

    def update(self, fields: Sequence[Any], samples: Samples, strict: bool) -> None:
        """Takes in one run."""
        shape = [int(d) for d in fields[-1]]
        if 0 in shape:
            return
        rows = np.stack([np.asarray(f, np.float64).reshape(-1) for f in fields[:-1]])
        if not np.isfinite(rows).all():
            self.finite = False
            if strict:
                raise SamplesError(
                    f"{samples.name}: tensor {self.name!r} holds NaN, infinities or values whose "
                    "squares overflow, and so has no statistics; leave it out."
                )
            return
        self._seen += int(np.prod(shape)) // shape[self.axis]
        if self._rows is None:
            self._rows = rows
        elif self._rows.shape != rows.shape:
            raise SamplesError(
                f"{samples.name}: tensor {self.name!r} has {rows.shape[1]} channels along axis "
                f"{self.axis}, but {self._rows.shape[1]} in the feeds before; choose an axis of "
                "fixed length."
            )
        else:
            self._rows[0] = np.minimum(self._rows[0], rows[0])
            self._rows[1] = np.maximum(self._rows[1], rows[1])
            self._rows[2:] += rows[2:]

    def result(self) -> ChannelStatistics:
        """What was seen; empty arrays if nothing was."""
        rows = np.zeros((4, 0)) if self._rows is None else self._rows
        means = rows[2:] / max(self._seen, 1)
        return ChannelStatistics(self.axis, self._seen, rows[0], rows[1], means[0], means[1])


def _reduced(model: Model, found: Mapping[str, _Sums]) -> Session:
    """A session whose outputs are `_FIELDS` values a tensor, one tensor after the other."""
    copy = model.copy()
    by_name = main_tensors(copy.graph)
    reducer = _Reducer(copy.graph, copy.opset)
    outputs: list[Variable] = []
    for name, sums in found.items():
        outputs += reducer.fields(by_name[name], sums.others)
    copy.graph.outputs = outputs
    copy.remove_unused()
    return open_session(copy, lean=True)


class _Reducer:
    """Appends the statistics of tensors to a graph."""

    def __init__(self, graph: Graph, opset: int) -> None:
        self._graph = graph
        self._opset = opset

    def fields(self, tensor: Variable, others: list[int]) -> list[Variable]:
        """Smallest, largest, sum and sum of squares over the `others` of the axes, and shape."""
        value = self._cast(tensor, TensorProto.FLOAT)
        if not others:
            value, others = (
                self._graph.add_node("Flatten", [value], attrs={"axis": 0}).outputs[0],
                [0],
            )
        made = [
            self._reduce("ReduceMin", value, others),
            self._reduce("ReduceMax", value, others),
            self._sum("ReduceSum", value, others),
            self._sum("ReduceSumSquare", value, others),
        ]
        for output in made:
            _declare(output, TensorProto.DOUBLE if output in made[2:] else TensorProto.FLOAT)
        shape: Variable = self._graph.add_node("Shape", [tensor]).outputs[0]
        _declare(shape, TensorProto.INT64)
        return [*made, shape]

    def _sum(self, op: str, value: Variable, axes: list[int]) -> Variable:
        """The last axis in float32, whose lengths are moderate, the others in float64.

        Float32 sums over all axes were off by 2e-5, which a variance beside a large mean shows.
        """
        inner = self._cast(self._reduce(op, value, axes[-1:], keep=True), TensorProto.DOUBLE)
        return self._reduce("ReduceSum", inner, axes)

    def _reduce(self, op: str, value: Variable, axes: list[int], *, keep: bool = False) -> Variable:
        inputs: list[Any] = [value]
        attrs: dict[str, Any] = {"keepdims": int(keep)}
        if self._opset >= (_SUM_AXES_INPUT_OPSET if op == "ReduceSum" else _AXES_INPUT_OPSET):
            inputs.append(self._graph.add_constant("statistics_axes", np.array(axes, np.int64)))
        else:
            attrs["axes"] = axes
        made: Variable = self._graph.add_node(op, inputs, attrs=attrs).outputs[0]
        return made

    def _cast(self, value: Variable, elem_type: int) -> Variable:
        made: Variable = self._graph.add_node("Cast", [value], attrs={"to": elem_type}).outputs[0]
        return made


def _declare(output: Variable, elem_type: int) -> None:
    """Gives a new graph output of rank 1 its type."""
    output.info = helper.make_tensor_value_info(output.name, elem_type, [None])
    output.dtype = helper.tensor_dtype_to_np_dtype(elem_type)
