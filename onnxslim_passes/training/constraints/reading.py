"""Finds out what compression did to each weight, from its values and the model's manifest.

- Zeros: weights that training left alone have none, or next to none. Where more than
  `LEAST_ZEROS` of a weight are zero, or the manifest says that a pass pruned it, zeros stay.
- A grid: small integers times a scale for each channel or block (`find_grid`). Its zeros are
  numbers like others, unless the weight was pruned: by the manifest, or by more zeros than numbers
  that were rounded to zero can explain.
- Few values: a codebook, of the tensor or of each channel.
- Equal weights of layers are one weight that was written twice: they stay tied.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from onnxslim_passes.errors import InvalidModelError
from onnxslim_passes.model import Constant, Model, Weight
from onnxslim_passes.numerics.sparsity import Mask
from onnxslim_passes.numerics.weight_formats import (
    BlockCodes,
    BlockLayout,
    block_layout,
    find_grid,
    usual_blocks,
)
from onnxslim_passes.report.manifest import read_manifest
from onnxslim_passes.training.constraints.base import Tied
from onnxslim_passes.training.constraints.codebooks import Codebook
from onnxslim_passes.training.constraints.grids import Levels, OnGrid
from onnxslim_passes.training.constraints.masks import Groups, Masked
from onnxslim_passes.training.parameters import Array, Constraint

__all__ = ["Latent", "pruned_weights", "read_weight", "tied_weights"]

LEAST_ZEROS = 0.01
_MOST_ROUNDED_ZEROS = 0.7
_MATRICES = frozenset(("weight", "recurrent", "embedding"))
_SMALLEST = 16  # in fewer elements, zeros and equal values are chance
_SMALLEST_TIED = 256
_PRUNING = "prune-"

# A table of at most so many values, with so many elements other than zero to each, is a codebook.
_MOST_VALUES = 4096
_MOST_SHORT_VALUES = 256  # of 16-bit floats, whose numbers coincide by themselves
_LEAST_SHARED = 2
_GROUPS = ((1, 2), (1, 4), (2, 4), (2, 8), (4, 8))
# Significant bits of a step size; those of short blocks are fewer, and so are they written.
_SHORT_BLOCK = 64


@dataclass(frozen=True)
class _Held:
    """Equal constants and where they stand."""

    constants: tuple[Constant, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class Latent:
    """Which constraints are decided again while training.

    Attributes:
        mask_steps: steps between decisions on what is zero; 0 keeps masks.
        assignment_steps: steps between decisions on shared values; 0 keeps assignments.
    """

    mask_steps: int = 0
    assignment_steps: int = 0


def pruned_weights(model: Model) -> frozenset[str]:
    """Where the manifest says that a pass pruned; empty without a manifest, or a damaged one."""
    try:
        manifest = read_manifest(model)
    except InvalidModelError:
        return frozenset()
    if manifest is None:
        return frozenset()
    return frozenset(
        decision.where
        for name, decision in manifest.decisions
        if name.startswith(_PRUNING) and decision.taken
    )


def tied_weights(weights: Iterable[Weight]) -> list[tuple[Weight, ...]]:
    """Groups of weights of layers with the same shape, type and values; single ones, too."""
    groups: dict[object, list[Weight]] = {}
    for weight in weights:
        key: object = id(weight)
        if weight.role in _MATRICES and weight.size >= _SMALLEST_TIED:
            digest = hashlib.sha256(weight.values.tobytes()).digest()
            key = (weight.dtype.name, weight.shape, digest)
        groups.setdefault(key, []).append(weight)
    return [tuple(group) for group in groups.values()]


def read_weight(
    group: tuple[Weight, ...], places: tuple[str, ...], *, pruned: bool, latent: Latent
) -> Constraint | None:
    """What holds a weight (or some that are tied), or None if nothing does.

    Args:
        group: with the same values.
        places: where each stands in the original model.
        pruned: whether the manifest says so.
        latent: what is decided again.
    """
    weight = group[0]
    values = weight.values
    held = _Held(tuple(one.constant for one in group), places)
    if weight.role not in _MATRICES or weight.size < _SMALLEST:
        return None
    zeros = float((values == 0).mean()) if values.size else 0.0
    is_pruned = pruned or zeros >= LEAST_ZEROS
    grid = _grid(weight, values)
    if grid is not None:
        surely = pruned or zeros > _MOST_ROUNDED_ZEROS
        return _on_grid(held, grid, (values != 0) if surely and zeros else None)
    book = _codebook(held, weight, values, latent)
    if book is not None:
        return book
    if not is_pruned or not zeros:
        return Tied(held.constants, places, 0) if len(group) > 1 else None
    mask: Mask = values != 0
    return Masked(
        held.constants,
        held.places,
        latent.mask_steps,
        mask,
        latent=latent.mask_steps > 0,
        groups=_groups(mask, weight.input_axis),
    )


def _groups(mask: Mask, axis: int | None) -> Groups | None:
    """The N:M pattern of a mask: every whole group of M has exactly N; None if there is none."""
    if axis is None:
        return None
    rows = np.moveaxis(mask, axis, -1)
    for kept, of in _GROUPS:
        whole = rows.shape[-1] // of * of
        counts = rows[..., :whole].reshape(*rows.shape[:-1], -1, of).sum(axis=-1)
        if counts.size and (counts <= kept).all() and (counts == kept).mean() > 0.9:
            return Groups(kept, of, axis)
    return None


# ---------------- grids


def _grid(weight: Weight, values: Array) -> tuple[BlockLayout, BlockCodes] | None:
    """The grid that needs the fewest step sizes, if the weight is on one."""
    if values.size < _SMALLEST_TIED:
        return None
    for layout in _layouts(weight):
        first = layout.cut(values)[:2]
        if find_grid(first, BlockLayout(first.shape, 0, layout.block)) is None:
            continue
        codes = find_grid(values, layout)
        if codes is not None:
            return layout, codes
    return None


def _layouts(weight: Weight) -> Iterator[BlockLayout]:
    axis = weight.channel_axis
    yield block_layout(weight.shape, None)
    if axis is not None:
        row = block_layout(weight.shape, axis)
        yield row
        for block in usual_blocks(row.block):
            if block < row.block:
                yield BlockLayout(weight.shape, axis, block)


def _on_grid(held: _Held, grid: tuple[BlockLayout, BlockCodes], mask: Mask | None) -> OnGrid:
    layout, found = grid
    low = found.codes.min(axis=1, keepdims=True).astype(np.int32)
    high = found.codes.max(axis=1, keepdims=True).astype(np.int32)
    binary = bool((np.abs(found.codes) == 1).all())
    largest = max(int(-low.min()), int(high.max()), 1)
    # A power of two less one on both sides is a symmetric format; others have their own place.
    if (largest & (largest + 1)) == 0:
        low = np.full((1, 1), -largest, np.int32)
        high = np.full((1, 1), largest, np.int32)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 1)
    bits = _significant_bits(found.scale)
    scale = found.scale.astype(np.float32)
    return OnGrid(
        held.constants, held.places, 0, layout, Levels(low, high, binary), scale, bits, mask
    )


def _significant_bits(scale: Array) -> int:
    """The fewest significant bits, at least 4, that hold all step sizes."""
    mantissa = np.frexp(scale.astype(np.float64))[0]
    for bits in range(4, 24):
        scaled = mantissa * 2.0**bits
        if (scaled == np.rint(scaled)).all():
            return bits
    return 24


# ---------------- codebooks


def _codebook(held: _Held, weight: Weight, values: Array, latent: Latent) -> Codebook | None:
    """A table for the tensor, or one for each channel, whichever has few values."""
    survivors = int(np.count_nonzero(values))
    axes: list[int | None] = [None]
    if weight.channel_axis is not None and len(weight.shape) > 1:
        axes.append(weight.channel_axis)
    for axis in axes:
        found = _tables(values.astype(np.float32), axis)
        if found is None or found[0].size * _LEAST_SHARED > survivors:
            continue
        if values.dtype.itemsize < 4 and np.bincount(found[2]).max() > _MOST_SHORT_VALUES:
            continue
        centroids, assignments, tables = found
        steps = latent.assignment_steps
        return Codebook(
            held.constants,
            held.places,
            steps,
            centroids,
            assignments,
            tables,
            axis,
            latent=steps > 0,
        )
    return None


def _tables(values: Array, axis: int | None) -> tuple[Array, Array, Array] | None:
    """Centroids, assignments and the table of each centroid; None if the values are many."""
    rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0)
    flat = rows.reshape(rows.shape[0], -1)
    most = min(_MOST_VALUES, flat.shape[1] // _LEAST_SHARED)
    centroids, tables, places = [], [], np.zeros(flat.shape, np.int32)
    start = 0
    for row, numbers in enumerate(flat):
        if np.unique(numbers[:_MOST_VALUES]).size > most:
            return None
        distinct, found = np.unique(numbers, return_inverse=True)
        if distinct.size > most:
            return None
        used = distinct != 0
        rank = np.where(used, np.cumsum(used) + start, 0)
        places[row] = rank[found.reshape(-1)]
        centroids.append(distinct[used])
        tables.append(np.full(int(used.sum()), row, np.int32))
        start += int(used.sum())
    if start == 0:
        return None
    moved = places.reshape(rows.shape)
    assignments = moved.reshape(values.shape) if axis is None else np.moveaxis(moved, 0, axis)
    return (
        np.concatenate(centroids).astype(np.float32),
        np.ascontiguousarray(assignments),
        np.concatenate(tables),
    )
