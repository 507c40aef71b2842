"""How a weight can share values: the forms that `cluster-weights` chooses from.

A form knows how it cuts a weight into rows, what its tables and indices will take in the file, and
how it finds the values. All of them take rows and give rows back.
"""

import abc
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxslim_passes.numerics.arrays import FloatArray
from onnxslim_passes.numerics.bits import packed_bytes
from onnxslim_passes.numerics.bounded import bounded_kmeans_1d
from onnxslim_passes.numerics.clustering import Init, gaussian_mixture_1d, kmeans_1d
from onnxslim_passes.numerics.common_codes import with_common_codes
from onnxslim_passes.numerics.entropy_constrained import entropy_constrained_1d
from onnxslim_passes.numerics.histograms import distinct_values
from onnxslim_passes.numerics.scaled_codebooks import scaled_codebook
from onnxslim_passes.numerics.vector_codebooks import distinct_vectors, kmeans_vectors
from onnxslim_passes.numerics.weight_formats import (
    BLOCK_SCALE_BITS,
    BlockLayout,
    block_layout,
    find_grid,
)

Array = npt.NDArray[Any]
Method = Literal["kmeans", "gmm"]

MOST_VALUES = 256
"""K at most: indices are bytes."""

# About what the nodes and tensor headers of a stored codebook take in the file.
_DECODER_BYTES = 128
_CHANNEL_SCALE_BITS = 11
_SCALE_BYTES = 2


@dataclass(frozen=True)
class Shared:
    """Values that were found.

    Attributes:
        rows: like the rows they are for.
        clusters: K, the entries of a table.
    """

    rows: FloatArray
    clusters: int


@dataclass(frozen=True)
class Form(abc.ABC):
    """A way to share values.

    Attributes:
        layout: the rows.
        seed: of whatever is drawn.
        init: where k-means of single weights starts.
    """

    layout: BlockLayout
    seed: int = 0
    init: Init = "optimal"

    @property
    def group(self) -> int:
        """Weights that share one index."""
        return 1

    @abc.abstractmethod
    def share(self, rows: FloatArray, clusters: int, importance: Array | None) -> Shared:
        """Rows with K values, or vectors of values.

        Args:
            rows: finite, shape (R, n) as `layout` cuts them.
            clusters: K.
            importance: how much the squared error of each element counts, > 0, shape (R, n).
        """

    @abc.abstractmethod
    def present(self, rows: FloatArray, limit: int) -> int | None:
        """How many values rows share already; None if more than `limit`."""

    @abc.abstractmethod
    def table_bytes(self, clusters: int, itemsize: int) -> int:
        """What tables, and scales, take for elements of `itemsize` bytes."""

    @abc.abstractmethod
    def words(self, clusters: int) -> str:
        """What was done."""

    def stored_bytes(self, clusters: int, itemsize: int) -> int:
        """About what tables, indices and decoder will take in the file."""
        size = int(np.prod(self.layout.shape, dtype=np.int64))
        bits = max(1, (clusters - 1).bit_length())
        codes = packed_bytes(size // self.group, bits)
        return codes + self.table_bytes(clusters, itemsize) + _DECODER_BYTES


@dataclass(frozen=True)
class OwnTables(Form):
    """A table of single values for each row.

    Attributes:
        method: how they are found.
        rate_weight: how much a bit of their code counts; see `entropy_constrained_1d`.
    """

    method: Method = "kmeans"
    rate_weight: float = 0.0

    def share(self, rows: FloatArray, clusters: int, importance: Array | None) -> Shared:
        """See `Form`; with `rate_weight` there is no importance."""
        if self.rate_weight:
            book = entropy_constrained_1d(
                rows, clusters, self.rate_weight, axis=0, init=self.init, seed=self.seed
            )
            return Shared(book.values(), book.clusters)
        fit = gaussian_mixture_1d if self.method == "gmm" else kmeans_1d
        book = fit(rows, clusters, axis=0, init=self.init, seed=self.seed, weights=importance)
        return Shared(book.values(), book.clusters)

    def within(
        self, rows: FloatArray, clusters: int, part: float, importance: Array | None
    ) -> Shared | None:
        """As `share`, and no element moves by more than a part of the largest one of its row."""
        reach = part * np.abs(rows.astype(np.float64)).max(axis=1)
        book = bounded_kmeans_1d(rows, clusters, reach, axis=0, weights=importance)
        return None if book is None else Shared(book.values(), book.clusters)

    def present(self, rows: FloatArray, limit: int) -> int | None:
        """See `Form`."""
        most = 0
        for row in rows:
            found = distinct_values(row, limit)
            if found is None:
                return None
            most = max(most, found.size)
        return most

    def table_bytes(self, clusters: int, itemsize: int) -> int:
        """See `Form`."""
        return self.layout.blocks * clusters * itemsize

    def words(self, clusters: int) -> str:
        """See `Form`."""
        unit = row_words(self.layout)
        return (
            f"{unit} shares {clusters} values" if unit else f"its elements share {clusters} values"
        )


@dataclass(frozen=True)
class OneTable(Form):
    """A table of int8 codes for all rows, and a scale for each.

    Attributes:
        length: of the groups that share an index.
    """

    length: int = 1

    @property
    def group(self) -> int:
        """See `Form`."""
        return self.length

    def share(self, rows: FloatArray, clusters: int, importance: Array | None) -> Shared:
        """See `Form`."""
        whole = block_layout(self.layout.shape, self.layout.axis).block
        book = scaled_codebook(
            rows,
            clusters,
            group=self.length,
            significant_bits=_CHANNEL_SCALE_BITS
            if self.layout.block == whole
            else BLOCK_SCALE_BITS,
            init=self.init,
            seed=self.seed,
            importance=importance,
        )
        return Shared(book.values(rows.dtype), book.clusters)

    def present(self, rows: FloatArray, limit: int) -> int | None:
        """See `Form`."""
        grid = find_grid(rows, BlockLayout(rows.shape, 0, rows.shape[1]))
        if grid is None:
            return None
        codes = with_common_codes(grid).codes
        found = distinct_vectors(codes.reshape(-1, self.length), limit)
        return None if found is None else len(found[0])

    def table_bytes(self, clusters: int, itemsize: int) -> int:
        """See `Form`."""
        return clusters * self.length + self.layout.blocks * _SCALE_BYTES

    def words(self, clusters: int) -> str:
        """See `Form`."""
        values = "values" if self.length == 1 else f"groups of {self.length} values"
        unit = row_words(self.layout) or "the tensor"
        return f"one table of {clusters} int8 {values}, and {unit} has a scale"


@dataclass(frozen=True)
class Vectors(Form):
    """A table of groups of values for the whole weight.

    Attributes:
        length: of the groups.
    """

    length: int = 2

    @property
    def group(self) -> int:
        """See `Form`."""
        return self.length

    def share(self, rows: FloatArray, clusters: int, importance: Array | None) -> Shared:
        """See `Form`."""
        vectors = rows.reshape(-1, self.length)
        weights = None if importance is None else importance.reshape(vectors.shape)
        book = kmeans_vectors(vectors, clusters, weights=weights, seed=self.seed)
        table = (book.centroids.astype(rows.dtype) + rows.dtype.type(0)).astype(rows.dtype)
        return Shared(table[book.indices].reshape(rows.shape), book.clusters)

    def present(self, rows: FloatArray, limit: int) -> int | None:
        """See `Form`."""
        found = distinct_vectors(rows.reshape(-1, self.length), limit)
        return None if found is None else len(found[0])

    def table_bytes(self, clusters: int, itemsize: int) -> int:
        """See `Form`."""
        return clusters * self.length * itemsize

    def words(self, clusters: int) -> str:
        """See `Form`."""
        return f"its elements share {clusters} groups of {self.length} values"


def row_words(layout: BlockLayout) -> str:
    """What a row is; "" if there is only one."""
    if layout.blocks == 1:
        return ""
    if layout.axis is None:
        return f"each block of {layout.block} elements"
    channel = f"along axis {layout.axis}"
    if layout.block == block_layout(layout.shape, layout.axis).block:
        return f"each channel {channel}"
    return f"each block of {layout.block} elements of a channel {channel}"
