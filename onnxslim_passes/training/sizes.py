"""Sizes of inputs that are free in the model and the same in all of training.

Exporters leave axes open that a network needs fixed: the height of a line of text, the samples of a
window. What follows from them, whole branches at times, is known only once they are.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import onnx

from onnxslim_passes.errors import UsageError, unknown_name
from onnxslim_passes.model import Model
from onnxslim_passes.report.records import Decision
from onnxslim_passes.runtime import InputSpec

__all__ = ["Sizes", "common_sizes", "fix_sizes"]

# A size, or None where it stays free, for each axis of some inputs.
Sizes: TypeAlias = Mapping[str, Sequence[int | None]]


def common_sizes(
    inputs: Sequence[InputSpec], shapes: Iterable[Mapping[str, tuple[int, ...]]]
) -> dict[str, list[int | None]]:
    """The free axes of inputs that have one size in all samples; the first axis stays free.

    Args:
        inputs: of the model. Axes of one symbol are fixed together or not at all.
        shapes: those of every feed, by input name.
    """
    found: dict[object, set[int]] = defaultdict(set)
    for feed in shapes:
        for spec in inputs:
            for axis, size in enumerate(feed[spec.name]):
                found[_key(spec, axis)].add(size)
    batch = {_key(spec, 0) for spec in inputs if spec.shape}
    common = {}
    for spec in inputs:
        keys = [_key(spec, axis) for axis in range(len(spec.shape))]
        sizes = [
            next(iter(found[key])) if key not in batch and len(found[key]) == 1 else None
            for key in keys
        ]
        free = [not isinstance(size, int) for size in spec.shape]
        if any(is_free and size is not None for is_free, size in zip(free, sizes, strict=True)):
            common[spec.name] = sizes
    return common


def _key(spec: InputSpec, axis: int) -> object:
    size = spec.shape[axis] if axis < len(spec.shape) else None
    named = isinstance(size, str) and size.isidentifier()
    return size if named else (spec.name, axis)


def fix_sizes(model: Model, sizes: Sizes) -> tuple[Decision, ...]:
    """Declares free axes of inputs as fixed, in place.

    Raises:
        UnknownNameError: there is no such input; with the nearest name.
        UsageError: another number of axes, or another size than the model declares.
    """
    inputs = {str(tensor.name): tensor for tensor in model.graph.inputs}
    decisions = []
    for name, wanted in sizes.items():
        if name not in inputs:
            raise unknown_name("input:", name, inputs)
        tensor = inputs[name]
        declared = onnx.ValueInfoProto()
        declared.CopyFrom(tensor.info)
        dims = declared.type.tensor_type.shape.dim
        if len(dims) != len(wanted):
            raise UsageError(f"input {name!r} has {len(dims)} axes, got sizes for {len(wanted)}.")
        for axis, (dim, size) in enumerate(zip(dims, wanted, strict=True)):
            if size is None or (dim.HasField("dim_value") and dim.dim_value == size):
                continue
            if dim.HasField("dim_value") and dim.dim_value > 0:
                raise UsageError(
                    f"input {name!r} has size {dim.dim_value} along axis {axis}, got {size}."
                )
            dim.dim_value = size
            reason = f"axis {axis} has size {size} in all of training"
            decisions.append(Decision(where=name, taken=True, reason=reason))
        tensor.info = declared
        tensor.shape = [dim.dim_value or dim.dim_param or None for dim in dims]
    return tuple(decisions)
