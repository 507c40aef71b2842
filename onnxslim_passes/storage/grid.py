"""Grids: small integers times a scale for each block, ``w = scale * (code - zero point)``.

What `quantize-weights` and rounding passes leave. The scales and codes are found in the values
alone (`numerics.weight_formats.find_grid`), so that no pass has to hand them over. Codes, zero
points and scales are tensors of few distinct values again, and each is stored by the cheapest of
the other encodings:

    Transpose(Reshape(Mul(Sub(codes, zero points), scales), moved shape))

Everything is computed in float32, in which products of codes and scales are exact, and cast to
the weight's type at the end. Without zero points there is no Sub; they are there only where each
block has its own place among the integers and codes thereby lose a bit.
"""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx import helper

from onnxslim_passes.numerics.common_codes import with_common_codes
from onnxslim_passes.numerics.weight_formats import (
    BlockCodes,
    BlockLayout,
    block_layout,
    find_grid,
    usual_blocks,
)
from onnxslim_passes.storage.base import Encoding, Expression, Literal, Plan, Site, Step, step
from onnxslim_passes.storage.choice import Offer
from onnxslim_passes.storage.codebook import (
    CodebookPacked,
    CodebookSparse,
    CodebookUint2,
    CodebookUint4,
    CodebookUint8,
)
from onnxslim_passes.storage.contents import MAX_CODES, Contents
from onnxslim_passes.storage.dense import Dense
from onnxslim_passes.storage.fill import Fill
from onnxslim_passes.storage.huffman import CodebookHuffman
from onnxslim_passes.storage.narrow import Narrow
from onnxslim_passes.storage.scattered import Bitmask, Rice
from onnxslim_passes.storage.vectors import CodebookVectors

Array = npt.NDArray[Any]

_PARTS: tuple[Encoding, ...] = (
    Dense(),
    Fill(),
    Narrow(),
    CodebookUint8(),
    CodebookUint4(),
    CodebookUint2(),
    CodebookPacked(),
    CodebookSparse(),
    CodebookHuffman(),
    CodebookVectors(),
    Bitmask(),
    Rice(),
)
# Of a scale and a zero point, about.
_ASIDE_BITS = 10
_KINDS = ("float16", "float32", "float64", "bfloat16")


class Grid(Encoding):
    """Integers and scales, for weights with more distinct values than one table holds."""

    name: ClassVar[str] = "grid"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """At most two, without and with zero points.

        A grid of the whole tensor has few distinct values: a codebook.
        """
        if contents.dtype.name not in _KINDS or contents.size < 8 or not contents.folds:
            return
        if contents.shared is not None and contents.shared.bits <= 1:
            return
        axes = range(len(contents.shape))
        found = [pair for axis in axes for pair in _grids(contents, axis)]
        if found:
            layout, grid = min(found, key=lambda pair: _estimate(*pair))
            yield from _plans(self.name, contents, site, layout, grid)


def _grids(contents: Contents, axis: int) -> Iterator[tuple[BlockLayout, BlockCodes]]:
    """The grids along one axis; long blocks may fit with larger codes, where scales divide."""
    shape = contents.shape
    whole = block_layout(shape, axis)
    blocks = [block for block in usual_blocks(whole.block) if block > 1]
    # A scale for each element would be the weight itself.
    if not blocks or not _may_fit(contents, BlockLayout(shape, axis, blocks[0])):
        return
    failed: list[int] = []
    for block in blocks:
        if any(block % shorter == 0 for shorter in failed):
            continue
        layout = BlockLayout(shape, axis, block)
        grid = find_grid(contents.values, layout)
        if grid is None:
            failed.append(block)
        else:
            yield layout, with_common_codes(grid)


def _estimate(layout: BlockLayout, grid: BlockCodes) -> int:
    """About how many bits codes and scales take."""
    low = np.minimum(grid.codes.min(axis=1), 0)
    high = np.maximum(grid.codes.max(axis=1), 0)
    bits = int((high - low).max()).bit_length()
    return bits * grid.codes.size + layout.blocks * _ASIDE_BITS


def _may_fit(contents: Contents, layout: BlockLayout) -> bool:
    """Whether the first row is on a grid of the shortest blocks; longer ones cannot be then."""
    values = contents.values
    row = np.take(values, [0], axis=layout.axis or 0)
    return find_grid(row, BlockLayout(row.shape, layout.axis, layout.block)) is not None


def _plans(
    name: str, contents: Contents, site: Site, layout: BlockLayout, grid: BlockCodes
) -> Iterator[Plan]:
    codes = grid.codes
    low = np.minimum(codes.min(axis=1, keepdims=True), 0)
    high = np.maximum(codes.max(axis=1, keepdims=True), 0)
    common = np.unique(codes)
    scale = grid.scale.astype(np.float32)
    if (scale != grid.scale).any():
        return
    figures: dict[str, int | float | str] = {
        "block": layout.block,
        "scales": np.unique(scale).size,
    }
    bits = (common.size - 1).bit_length()
    if common.size <= MAX_CODES:
        plain = _part(codes, layout.block, site)
        yield Plan(
            name,
            _rebuilt(plain, _part(scale, 1, site), layout, contents.dtype),
            {"bits": bits, **figures},
        )
    own_bits = int((high - low).max()).bit_length()
    if own_bits < bits:
        largest = (1 << own_bits) - 1
        zero_point = np.clip(1 << (own_bits - 1), -low, largest - high)
        moved = step(
            "Sub", _part(codes + zero_point, layout.block, site), _part(zero_point, 1, site)
        )
        root = _rebuilt(moved, _part(scale, 1, site), layout, contents.dtype)
        yield Plan(name, root, {"bits": own_bits, "zero_points": "per block", **figures})


def _part(values: Array, columns: int, site: Site) -> Expression:
    """The cheapest decoder of a part, float32, shape (blocks, columns)."""
    # As a vector it has no channels, on which encodings would look for tables of their own.
    contents = Contents(values.reshape(-1).astype(np.float32))
    allowed = (part for part in _PARTS if site.allows(part.name))
    plans = (plan for part in allowed for plan in part.plans(contents, site))
    best = min((Offer(plan, site) for plan in plans), key=lambda offer: offer.own_bytes)
    return step("Reshape", best.plan.root, Literal.of((-1, columns), np.int64))


def _rebuilt(
    codes: Expression, scale: Expression, layout: BlockLayout, dtype: np.dtype[Any]
) -> Step:
    values = step("Mul", codes, scale)
    if dtype != np.dtype(np.float32):
        values = step("Cast", values, to=int(helper.np_dtype_to_tensor_dtype(dtype)))
    if not layout.axis:
        return step("Reshape", values, Literal.of(layout.shape, np.int64))
    axis, rank = layout.axis, len(layout.shape)
    moved = step("Reshape", values, Literal.of(layout.moved_shape, np.int64))
    order = (*range(1, axis + 1), 0, *range(axis + 1, rank))
    return step("Transpose", moved, perm=order)
