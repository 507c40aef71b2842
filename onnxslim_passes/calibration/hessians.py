"""Gram matrices of the inputs of layers over all samples: H = X X^T.

X (K, R) holds what the layer multiplies its weights with: a row for each weight of an output, a
column for each output position of each sample. For a convolution these are patches (im2col), for
each group of channels by itself.

Tensors are taken out of ONNX Runtime feed by feed and released at once; what stays are the
matrices. Where those and the tensors of one feed would exceed a limit, the caller gets the matrices
in groups, at the price of a further run over the data for each.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from onnxslim_passes.calibration.run import Progress, main_tensors
from onnxslim_passes.calibration.samples import Feed, Samples
from onnxslim_passes.model import Model
from onnxslim_passes.runtime import Session, open_session

Array = npt.NDArray[Any]
Item = TypeVar("Item", bound=Hashable)

_PIECE = 1 << 21  # elements of X that are laid out at a time


class Layout(Protocol):
    """How a layer sees its input; hashable and comparable."""

    @property
    def shape(self) -> tuple[int, int]:
        """(G, K): groups, and inputs of an output within its group."""
        ...

    def pieces(self, values: Array) -> Iterator[Array]:
        """X of one tensor, in its dtype, in pieces of shape (G, K, R)."""
        ...


@dataclass(frozen=True)
class Vectors:
    """The input of a matrix product: vectors of `size` elements along axis -1 or -2."""

    size: int
    axis: int = -1

    @property
    def shape(self) -> tuple[int, int]:
        """See `Layout`."""
        return 1, self.size

    def pieces(self, values: Array) -> Iterator[Array]:
        """See `Layout`."""
        if self.axis == -2 and values.ndim > 1:
            for matrix in values.reshape(-1, *values.shape[-2:]):
                yield matrix[None]
        else:
            yield values.reshape(1, -1, self.size).swapaxes(1, 2)


@dataclass(frozen=True)
class Patches:
    """The input of a convolution (B, C, *spatial), as its windows see it.

    Attributes:
        channels: C.
        group: groups of channels.
        kernel: size of the window, for each spatial axis.
        strides: likewise.
        dilations: likewise.
        pads: begins, then ends; () where `auto_pad` says it.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER.
    """

    channels: int
    group: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"

    @property
    def shape(self) -> tuple[int, int]:
        """See `Layout`."""
        return self.group, self.channels // self.group * math.prod(self.kernel)

    def pieces(self, values: Array) -> Iterator[Array]:
        """See `Layout`."""
        windows = self._windows(values)
        if not windows.size:
            return
        rank = len(self.kernel)
        # (B, C, *out, *kernel) -> (C, *kernel, B, *out)
        order = (1, *range(2 + rank, 2 + 2 * rank), 0, *range(2, 2 + rank))
        windows = windows.transpose(order)
        batch, rows = windows.shape[1 + rank], windows.shape[2 + rank]
        group, size = self.group, self.shape[1]
        of_row = windows.size // (batch * rows)
        images = max(1, _PIECE // (of_row * rows))
        lines = max(1, _PIECE // of_row) if images == 1 else rows
        for first in range(0, batch, images):
            for top in range(0, rows, lines):
                here = (slice(None),) * (1 + rank)
                part = windows[(*here, slice(first, first + images), slice(top, top + lines))]
                yield part.reshape(group, size, -1)

    def _windows(self, values: Array) -> Array:
        """A view (B, C, *out, *kernel) of the padded input."""
        rank = len(self.kernel)
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        widths = [(0, 0), (0, 0), *self._padding(values.shape[2:], reach)]
        if any(map(any, widths)):
            values = np.pad(values, widths)
        if any(size < wanted for size, wanted in zip(values.shape[2:], reach, strict=True)):
            return np.empty(0, np.float32)
        axes = tuple(range(2, 2 + rank))
        windows = np.lib.stride_tricks.sliding_window_view(values, tuple(reach), axis=axes)
        steps = [slice(None, None, s) for s in self.strides]
        gaps = [slice(None, None, d) for d in self.dilations]
        picked: Array = windows[(slice(None), slice(None), *steps, *gaps)]
        return picked

    def _padding(self, sizes: Sequence[int], reach: Sequence[int]) -> list[tuple[int, int]]:
        if self.auto_pad == "VALID":
            return [(0, 0)] * len(sizes)
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            pairs = []
            for size, wanted, stride in zip(sizes, reach, self.strides, strict=True):
                total = max(0, (math.ceil(size / stride) - 1) * stride + wanted - size)
                less, more = total // 2, total - total // 2
                pairs.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
            return pairs
        rank = len(sizes)
        return list(zip(self.pads[:rank], self.pads[rank:], strict=True))


@dataclass(frozen=True, eq=False)
class Gram:
    """H of one tensor and layout.

    Attributes:
        matrix: float64, shape (G, K, K); not finite where the tensor was not.
        positions: how many columns X had.
    """

    matrix: npt.NDArray[np.float64]
    positions: int


Key = tuple[str, Layout]
"""The name of a tensor of the main graph, and how a layer sees it."""


def gram_bytes(layout: Layout) -> int:
    """What one matrix takes in memory."""
    groups, size = layout.shape
    return 8 * groups * size * size


def collect_grams(
    model: Model,
    keys: Iterable[Key],
    samples: Samples,
    *,
    progress: Progress | None = None,
) -> dict[Key, Gram]:
    """Runs the model on all samples once.

    Args:
        model: stays as it is.
        keys: tensors of the main graph, of floats; equal keys are summed once.
        samples: the data.
        progress: is shown the feeds.

    Raises:
        SamplesError: the data does not fit the model.
        RuntimeRefusedError: the model does not run on the data.
    """
    wanted = list(dict.fromkeys(keys))
    sums = {key: _Sum(key[1]) for key in wanted}
    by_tensor: dict[str, list[_Sum]] = {}
    for key in wanted:
        by_tensor.setdefault(key[0], []).append(sums[key])
    with _exposing(model, list(by_tensor)) as session:
        feeds: Iterable[Feed] = samples.feeds(session.inputs)
        if progress is not None:
            feeds = progress.track(feeds, "Hessians", total=samples.feed_count)
        for feed in feeds:
            values = list(session.run(feed).values())
            # Last ones first, so that each is released as soon as it is summed.
            for name in reversed(by_tensor):
                array = values.pop()
                for each in by_tensor[name]:
                    each.add(array)
                del array
    return {key: Gram(each.matrix, each.positions) for key, each in sums.items()}


def in_groups(
    model: Model, items: Mapping[Item, Sequence[Key]], samples: Samples, limit_bytes: int
) -> list[list[Item]]:
    """Splits items, in order, so that each group's matrices and tensors stay within a limit.

    Tensors count as large as they are on the first feed. An item beyond the limit is alone.
    """
    names = list(dict.fromkeys(name for keys in items.values() for name, _ in keys))
    tensor_bytes = _tensor_bytes(model, names, samples)
    groups: list[list[Item]] = []
    held: dict[Hashable, int] = {}
    for item, keys in items.items():
        added: dict[Hashable, int] = {key: gram_bytes(key[1]) for key in keys}
        added |= {name: tensor_bytes[name] for name, _ in keys}
        if not groups or sum((held | added).values()) > limit_bytes:
            groups.append([])
            held = {}
        groups[-1].append(item)
        held |= added
    return groups


class _Sum:
    """One matrix, piece by piece."""

    def __init__(self, layout: Layout) -> None:
        groups, size = layout.shape
        self._layout = layout
        self.matrix = np.zeros((groups, size, size))
        self.positions = 0

    def add(self, values: Array) -> None:
        # What is not finite shows in the sum.
        with np.errstate(over="ignore", invalid="ignore"):
            for piece in self._layout.pieces(values):
                # In float64 the sums of float32 products do not depend on how samples are batched,
                # but for digits that no rounding sees.
                piece = piece.astype(np.float64)
                if len(piece) == 1:
                    # A matrix times its own transpose costs half of any other product.
                    self.matrix[0] += piece[0] @ piece[0].T
                else:
                    self.matrix += piece @ piece.swapaxes(1, 2)
                self.positions += piece.shape[2]


def _exposing(model: Model, names: Sequence[str], *, shapes: bool = False) -> Session:
    """A session with these tensors as float32, or their shapes, as its only outputs, in order."""
    copy = model.copy()
    tensors = main_tensors(copy.graph)
    outputs = []
    for name in names:
        op, elem_type = ("Shape", TensorProto.INT64) if shapes else ("Cast", TensorProto.FLOAT)
        # A Cast of float32 costs nothing: ONNX Runtime drops it.
        attrs = {} if shapes else {"to": int(elem_type)}
        made = copy.graph.add_node(op, [tensors[name]], attrs=attrs).outputs[0]
        shape = [None] if shapes else None
        made.info = helper.make_tensor_value_info(made.name, elem_type, shape)
        outputs.append(made)
    copy.graph.outputs = outputs
    copy.remove_unused()
    return open_session(copy, lean=True)


def _tensor_bytes(model: Model, names: Sequence[str], samples: Samples) -> dict[str, int]:
    with _exposing(model, names, shapes=True) as session:
        feed = next(samples.feeds(session.inputs))
        found = session.run(feed).values()
    return {name: 4 * math.prod(map(int, s)) for name, s in zip(names, found, strict=True)}


__all__ = [
    "Gram",
    "Key",
    "Layout",
    "Patches",
    "Vectors",
    "collect_grams",
    "gram_bytes",
    "in_groups",
]
