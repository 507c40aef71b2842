"""Codebooks with a table for each block of a channel.

    Transpose(Reshape(GatherElements(tables, codes), moved shape))

Blocks are the rows of a matrix, and a matrix whose rows have few values each is stored by the
encodings of `codebook`. What `cluster-weights` leaves with ``per=block``.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np

from onnxslim_passes.numerics.weight_formats import BlockLayout, block_layout, usual_blocks
from onnxslim_passes.storage.base import Encoding, Expression, Plan, Site, Step, step
from onnxslim_passes.storage.codebook import CodebookPacked, CodebookUint4, CodebookUint8
from onnxslim_passes.storage.contents import MAX_CODES, Contents
from onnxslim_passes.storage.streams import reshape

_PARTS: tuple[Encoding, ...] = (CodebookUint8(), CodebookUint4(), CodebookPacked())


class CodebookBlocks(Encoding):
    """For weights of which neither the whole nor the channels have few values."""

    name: ClassVar[str] = "codebook-blocks"

    def plans(self, contents: Contents, site: Site) -> Iterable[Plan]:
        """For each length of blocks that needs fewer bits than longer ones."""
        if not contents.folds or contents.dtype.itemsize == 1 or contents.size < 64:
            return
        if contents.shared is not None or contents.shared_by_channel:
            return
        for layout in _layouts(contents):
            rows = Contents(layout.cut(contents.values))
            by_row = [shared for shared in rows.shared_by_channel if shared.axis == 0]
            if not by_row:
                continue
            for plan in _plans(rows, site):
                figures = {**plan.figures, "per": f"block of {layout.block}"}
                yield Plan(self.name, _joined(plan.root, layout), figures)


def _plans(rows: Contents, site: Site) -> Iterator[Plan]:
    for part in _PARTS:
        if site.allows(part.name):
            yield from part.plans(rows, site)


def _layouts(contents: Contents) -> Iterator[BlockLayout]:
    """Blocks of which the first has few values, and fewer than that of longer ones."""
    for axis in range(len(contents.shape)):
        row = block_layout(contents.shape, axis)
        lengths = usual_blocks(row.block)[:-1]
        first = np.moveaxis(contents.bits.reshape(contents.shape), axis, 0)[0].reshape(-1)
        bits = MAX_CODES.bit_length()
        for length in reversed(lengths):
            clusters = np.unique(first[:length]).size
            if clusters <= length // 2 and (clusters - 1).bit_length() < bits:
                bits = (clusters - 1).bit_length()
                yield BlockLayout(contents.shape, axis, length)


def _joined(rows: Expression, layout: BlockLayout) -> Step:
    """The weight of these blocks."""
    axis, rank = layout.axis or 0, len(layout.shape)
    if axis == 0:
        return reshape(rows, layout.shape)
    order = (*range(1, axis + 1), 0, *range(axis + 1, rank))
    return step("Transpose", reshape(rows, layout.moved_shape), perm=order)
