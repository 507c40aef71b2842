"""Where the windows of convolutions and poolings lie."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.gradients.step import Step
from onnxslim_passes.training.shapes import Shape

_FEW_WINDOWS = 16


@dataclass(frozen=True)
class Geometry:
    """The windows of one node, a number for each spatial axis.

    Attributes:
        kernel: size of a window.
        strides: distance of windows.
        dilations: distance of the elements in a window.
        begins: padding before the first element.
        ends: padding behind the last element.
        group: number of groups of channels, each of which is convolved alone.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    group: int = 1

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def axes(self) -> list[int]:
        """The spatial axes of a tensor (N, C, ...)."""
        return list(range(2, 2 + self.rank))

    @property
    def taps(self) -> int:
        """Number of elements in a window."""
        return math.prod(self.kernel)

    @property
    def spans(self) -> tuple[int, ...]:
        """From the first to the last element of a window, both included."""
        pairs = zip(self.kernel, self.dilations, strict=True)
        return tuple((size - 1) * dilation + 1 for size, dilation in pairs)

    @property
    def pads(self) -> list[int]:
        """Padding as ONNX's attribute has it."""
        return [*self.begins, *self.ends]

    @property
    def padded(self) -> bool:
        """Whether there is any padding."""
        return any(self.pads)

    @property
    def unit(self) -> bool:
        """Whether every window is one element and every element one window."""
        return self.taps == 1 and not self.padded and all(step == 1 for step in self.strides)

    @property
    def disjoint(self) -> bool:
        """Whether no element is in two windows."""
        return all(span <= step for span, step in zip(self.spans, self.strides, strict=True))


def geometry_of(step: Step, kernel: Sequence[int]) -> Geometry:
    """The geometry of a Conv or pooling node with windows of this size.

    Raises:
        UnsupportedModelError: the padding depends on a size that is not fixed.
    """
    ones = [1] * len(kernel)
    strides = list(step.attr("strides", ones))
    dilations = list(step.attr("dilations", ones))
    pads = list(step.attr("pads", [0] * 2 * len(kernel)))
    bare = Geometry(tuple(kernel), tuple(strides), tuple(dilations), (), ())
    rule = step.attr("auto_pad", "NOTSET")
    if rule == "VALID":
        pads = [0] * 2 * len(kernel)
    elif rule.startswith("SAME"):
        pads = _same_pads(step, bare, upper=rule == "SAME_UPPER")
    half = len(kernel)
    return Geometry(
        bare.kernel,
        bare.strides,
        bare.dilations,
        tuple(pads[:half]),
        tuple(pads[half:]),
        step.attr("group", 1),
    )


def _same_pads(step: Step, windows: Geometry, *, upper: bool) -> list[int]:
    """Padding such that there are size / stride windows, rounded up."""
    begins, ends = [], []
    for axis, (span, stride) in enumerate(zip(windows.spans, windows.strides, strict=True), 2):
        if stride == 1:
            total = span - 1
        else:
            size = step.emit.size(step.x, axis)
            total = max((-(-size // stride) - 1) * stride + span - size, 0)
        less = total // 2
        begins.append(less if upper else total - less)
        ends.append(total - less if upper else less)
    return [*begins, *ends]


def scatter_windows(
    emit: Emitter, dy: Tensor, weight: Tensor, like: Tensor, windows: Geometry
) -> Tensor:
    """Adds up windows that overlap: the transpose of a convolution.

    Args:
        emit: where to.
        dy: (N, O, ...), a number for each window.
        weight: (O, C / group, kernel...).
        like: (N, C, ...), what the windows were taken from; gives the shape of the result.
        windows: where they lie.

    Returns:
        A tensor in the shape of `like`.
    """
    if windows.unit and windows.group == 1:
        return emit.op("Conv", dy, emit.transpose(weight, [1, 0, *windows.axes]))
    if _few_windows(emit.shape(like)[2:], emit.shape(dy)[2:], windows):
        return _scatter_by_product(emit, dy, weight, like, windows)
    beyond = _beyond(emit.shape(like)[2:], emit.shape(dy)[2:], windows)
    fitting = beyond is not None
    # Where sizes are free: as far as the last window goes, then cut or filled up.
    excess = beyond if beyond is not None else [0] * windows.rank
    made = emit.op(
        "ConvTranspose",
        dy,
        weight,
        group=windows.group,
        strides=windows.strides,
        dilations=windows.dilations,
        pads=[*windows.begins, *(max(size, 0) for size in excess)],
        output_padding=[max(-size, 0) for size in excess],
    )
    return made if fitting else _fit(emit, made, like, windows)


def _few_windows(sizes: Shape, counts: Shape, windows: Geometry) -> bool:
    """Whether one product for the whole batch is faster than ConvTranspose's one for each sample.

    With few windows in a sample it reads the weights more often than it computes with them.
    """
    if windows.group != 1 or windows.rank != 2:
        return False
    found = [size for size in counts if isinstance(size, int)]
    return found == _fitting_windows(sizes, windows) and math.prod(found) <= _FEW_WINDOWS


def _fitting_windows(sizes: Shape, windows: Geometry) -> list[int] | None:
    """How many windows fit into the padded tensor, which is what Col2Im adds up.

    Poolings with ceil_mode have more. None if a size is free.
    """
    fitting = []
    for axis, size in enumerate(sizes):
        if not isinstance(size, int):
            return None
        padded = windows.begins[axis] + size + windows.ends[axis]
        fitting.append((padded - windows.spans[axis]) // windows.strides[axis] + 1)
    return fitting


def _scatter_by_product(
    emit: Emitter, dy: Tensor, weight: Tensor, like: Tensor, windows: Geometry
) -> Tensor:
    """(C k k, O) x (O, N windows), then every window added to its place by Col2Im."""
    outputs, channels = emit.size(weight, 0), emit.size(weight, 1)
    columns = emit.reshape(emit.transpose(dy, [1, 0, *windows.axes]), [outputs, -1])
    flat = emit.reshape(weight, [outputs, -1])
    product = emit.op("Gemm", flat, columns, transA=1)
    places = math.prod(emit.size(dy, axis) for axis in windows.axes)
    apart = emit.reshape(product, [channels * windows.taps, -1, places])
    return emit.op(
        "Col2Im",
        emit.transpose(apart, [1, 0, 2]),
        emit.ints(*(emit.size(like, axis) for axis in windows.axes)),
        emit.ints(*windows.kernel),
        pads=windows.pads,
        strides=windows.strides,
        dilations=windows.dilations,
    )


def _beyond(sizes: Shape, counts: Shape, windows: Geometry) -> list[int] | None:
    """How far the last window reaches behind the last element; None if a size is free."""
    result = []
    for axis in range(windows.rank):
        size, count = sizes[axis], counts[axis]
        if not isinstance(size, int) or not isinstance(count, int):
            return None
        last = (count - 1) * windows.strides[axis] + windows.spans[axis]
        result.append(last - windows.begins[axis] - size)
    return result


def _fit(emit: Emitter, made: Tensor, like: Tensor, windows: Geometry) -> Tensor:
    """Cuts or fills up with zeros at the ends of the spatial axes."""
    missing = emit.sub(emit.op("Shape", like, start=2), emit.op("Shape", made, start=2))
    begins = emit.constant([0] * windows.rank)
    pads = emit.op("Concat", begins, missing, axis=0)
    return emit.op("Pad", made, pads, None, emit.ints(*windows.axes))
