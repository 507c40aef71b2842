"""Lets the elements of a weight share a few values.

Han, Mao, Dally: "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
Quantization and Huffman Coding", ICLR 2016, section 3: k-means on each weight; the centroids are
the shared values. This pass changes values only, in their own dtype; `store-weights` then finds
that there are few of them and stores indices of so many bits.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from onnxslim_passes.model import Model, Role, Weight
from onnxslim_passes.numerics.arrays import FloatArray
from onnxslim_passes.numerics.bits import packed_bytes
from onnxslim_passes.numerics.bounded import bounded_kmeans_1d
from onnxslim_passes.numerics.clustering import Init, gaussian_mixture_1d, kmeans_1d
from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.numerics.histograms import distinct_values
from onnxslim_passes.numerics.weight_formats import BlockLayout, block_layout
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.quantized import stored_decisions
from onnxslim_passes.passes.selection import Selection, role_refusal, values_refusal

__all__ = ["ClusterWeights"]

DEFAULT_BITS = 4
MOST_BITS = 8

_ROLES: frozenset[Role] = frozenset({"weight", "recurrent", "embedding"})
# About what the nodes and tensor headers of a stored codebook take in the file.
_DECODER_BYTES = 128
# Counting distinct values stops here: a figure for the report, not worth a full sort.
_COUNTED_VALUES = 1 << 16
_DEFAULT_BLOCK = 1024


@pass_options
class ClusterWeights(Selection, Pass):
    """k-means or a Gaussian mixture on each weight, or on parts of it."""

    name: ClassVar[str] = "cluster-weights"
    stage: ClassVar[Stage] = Stage.CLUSTER
    summary: ClassVar[str] = "the elements of a weight share a few values"
    references: ClassVar[tuple[str, ...]] = (
        "Han, Mao and Dally 2016, Deep Compression: Compressing Deep Neural Networks with Pruning, "
        "Trained Quantization and Huffman Coding, arXiv:1510.00149",
        "Ullrich, Meeds and Welling 2017, Soft Weight-Sharing for Neural Network Compression, "
        "arXiv:1702.04008 (Gaussian mixtures)",
        "Gronlund et al. 2017, Fast Exact k-Means, k-Medians and Bregman Divergence Clustering in "
        "1D, arXiv:1701.07204",
    )

    bits: Annotated[
        int | None,
        Field(ge=1, le=MOST_BITS, description="2^bits shared values; 4 if no size is given"),
    ] = None
    clusters: Annotated[
        int | None, Field(ge=2, le=256, description="instead of bits: how many shared values")
    ] = None
    sqnr_db: Annotated[
        float | None,
        Field(
            gt=0,
            description="instead of bits: the fewest with this signal-to-noise ratio, per weight",
        ),
    ] = None
    max_error: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="instead of bits: the fewest with which no element moves by more than this "
            "part of the largest magnitude that shares its values",
        ),
    ] = None
    method: Annotated[
        Literal["kmeans", "gmm"],
        Field(description="kmeans: least squared error; gmm: means of a Gaussian mixture"),
    ] = "kmeans"
    per: Annotated[
        Literal["tensor", "channel", "block"],
        Field(description="what has a set of values of its own: tensor, output channel, or block"),
    ] = "tensor"
    block_size: Annotated[
        int, Field(ge=8, description="elements of a block of a channel, with per=block")
    ] = _DEFAULT_BLOCK
    init: Annotated[
        Init,
        Field(
            description="where centroids start: at the optimum, evenly over the range, at "
            "quantiles, or drawn"
        ),
    ] = "optimal"
    min_elements: Annotated[int, Field(ge=1, description="smaller weights are left alone")] = 512

    @model_validator(mode="after")
    def _fits_together(self) -> "ClusterWeights":
        sizes = ("bits", "clusters", "sqnr_db", "max_error")
        given = [name for name in sizes if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
        if self.max_error is not None and (self.method != "kmeans" or self.init != "optimal"):
            raise ValueError("max_error has a k-means of its own; leave method and init out")
        if self.block_size != _DEFAULT_BLOCK and self.per != "block":
            raise ValueError(f"block_size is for per=block; per is {self.per}")
        return self

    def preview(self, model: Model) -> tuple[Decision, ...]:
        """The candidates, without the work on them."""
        return tuple(
            self._refusal(weight) or Decision(where=weight.where, taken=True, reason="a candidate")
            for weight in model.weights()
        )

    def apply(self, model: Model, context: Context) -> PassResult:
        """Writes shared values; a decision for every weight of the model, in its order."""
        self.check(model)
        weights = model.weights()
        decisions = tuple(
            self._refusal(weight) or self._cluster(weight, context.seed)
            for weight in context.progress.track(weights, self.name, len(weights))
        )
        changed = any(decision.taken for decision in decisions)
        return PassResult(changed, (*decisions, *stored_decisions(model, "clustering")))

    # ---- which weights

    @property
    def _count(self) -> int | None:
        """K, the number of shared values, or None if a target decides."""
        if self.sqnr_db is not None or self.max_error is not None:
            return None
        if self.clusters is not None:
            return self.clusters
        return int(1 << (DEFAULT_BITS if self.bits is None else self.bits))

    def _refusal(self, weight: Weight) -> Decision | None:
        """Why a weight is not clustered, or None."""
        early = role_refusal(weight, _ROLES) or self.verdict(weight)
        return early or self._size_refusal(weight) or values_refusal(weight)

    def _layout(self, weight: Weight) -> BlockLayout:
        """How it is cut into rows that share values."""
        axis = weight.channel_axis
        if self.per == "tensor" or not weight.size or not weight.shape:
            return block_layout(weight.shape, None)
        if self.per == "channel":
            return block_layout(weight.shape, axis)
        return block_layout(weight.shape, axis, self.block_size)

    def _size_refusal(self, weight: Weight) -> Decision | None:
        """A refusal where codebook and codes take no less than the weight itself."""
        if not weight.size:
            return Decision(where=weight.where, taken=False, reason="has no elements")
        layout, count = self._layout(weight), self._count or 2
        if _stored_bytes(weight, layout, count) < weight.size * weight.dtype.itemsize:
            return None
        bits = (count - 1).bit_length()
        held = "the table" if layout.blocks == 1 else f"{layout.blocks} tables of {count} values"
        reason = f"{held} and {weight.size} indices of {bits} bits take no less than it does"
        return Decision(where=weight.where, taken=False, reason=reason)

    # ---- the work

    def _cluster(self, weight: Weight, seed: int) -> Decision:
        """Clusters one weight, unless it has so few values already."""
        layout = self._layout(weight)
        rows = layout.cut(weight.values)
        few = self._already(weight, layout, rows)
        if few is not None:
            return few
        found = self._shared(rows, seed)
        where = weight.where
        if found is None:
            return Decision(where=where, taken=False, reason=self._unreachable())
        after, clusters = found
        if _stored_bytes(weight, layout, clusters) >= weight.size * weight.dtype.itemsize:
            reason = f"needs {clusters} values, whose tables and indices take no less than it does"
            return Decision(where=where, taken=False, reason=reason)
        before = weight.values
        weight.values = layout.join(after)
        return Decision(
            where=where,
            taken=True,
            reason=self._what_was_done(layout, clusters),
            figures={
                "clusters": clusters,
                "bits": (clusters - 1).bit_length(),
                "distinct_before": _distinct(before),
                "distinct": _distinct(weight.values),
                "sqnr_db": round(sqnr_db(before, weight.values), 2),
            },
        )

    def _already(self, weight: Weight, layout: BlockLayout, rows: FloatArray) -> Decision | None:
        """A refusal of a weight that has few values, or None."""
        most = _most_distinct(rows, self._count or 1 << MOST_BITS)
        if most is None:
            return None
        if self._count is None:
            stored = _stored_bytes(weight, layout, most)
            if stored >= weight.size * weight.dtype.itemsize:
                return None
        limit = most if self._count is None else self._count
        units = {"channel": "no channel", "block": "no block"}
        unit = units[self.per] if layout.blocks > 1 else ""
        reason = f"{unit} has more than {limit} values already"
        if not unit:
            reason = f"has no more than {limit} values already"
        figures = {"distinct": _distinct(weight.values)}
        return Decision(where=weight.where, taken=False, reason=reason, figures=figures)

    def _shared(self, rows: FloatArray, seed: int) -> tuple[FloatArray, int] | None:
        """Rows of shared values and their number K; None if the target is out of reach."""
        if self._count is not None:
            return self._with(rows, self._count, seed)
        if self.max_error is not None:
            reach = self.max_error * np.abs(rows.astype(np.float64)).max(axis=1)

            def bounded(bits: int) -> tuple[FloatArray, int] | None:
                book = bounded_kmeans_1d(rows, 1 << bits, reach, axis=0)
                return None if book is None else (book.values(), book.clusters)

            return _fewest_bits(bounded)
        target = self.sqnr_db
        assert target is not None

        def accurate(bits: int) -> tuple[FloatArray, int] | None:
            found = self._with(rows, 1 << bits, seed)
            return found if sqnr_db(rows, found[0]) >= target else None

        return _fewest_bits(accurate)

    def _with(self, rows: FloatArray, clusters: int, seed: int) -> tuple[FloatArray, int]:
        fit = gaussian_mixture_1d if self.method == "gmm" else kmeans_1d
        book = fit(rows, clusters, axis=0, init=self.init, seed=seed)
        return book.values(), book.clusters

    # ---- words

    def _unreachable(self) -> str:
        wanted = f"max_error={self.max_error}"
        if self.sqnr_db is not None:
            wanted = f"sqnr_db={self.sqnr_db}"
        return f"{MOST_BITS} bits do not hold {wanted}"

    def _what_was_done(self, layout: BlockLayout, clusters: int) -> str:
        if layout.blocks == 1 or layout.axis is None:
            if layout.blocks == 1:
                reason = f"its elements share {clusters} values"
            else:
                reason = f"blocks of {layout.block} elements share {clusters} values each"
            if self.per != "tensor" and layout.axis is None:
                reason += "; its uses agree on no channel axis"
            return reason
        if layout.block == block_layout(layout.shape, layout.axis).block:
            return f"each channel along axis {layout.axis} shares {clusters} values"
        return (
            f"blocks of {layout.block} elements of a channel along axis {layout.axis} share "
            f"{clusters} values each"
        )


def _stored_bytes(weight: Weight, layout: BlockLayout, clusters: int) -> int:
    """About what tables and indices will take."""
    codes = packed_bytes(weight.size, max(1, (clusters - 1).bit_length()))
    return codes + layout.blocks * clusters * weight.dtype.itemsize + _DECODER_BYTES


def _fewest_bits(
    attempt: Callable[[int], tuple[FloatArray, int] | None],
) -> tuple[FloatArray, int] | None:
    """What the smallest number of bits gives with which `attempt` succeeds, by bisection."""
    best, low, high = None, 1, MOST_BITS
    while low <= high:
        middle = (low + high) // 2
        found = attempt(middle)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle - 1
    return best


def _most_distinct(rows: FloatArray, limit: int) -> int | None:
    """The number of distinct values of the row that has most; None if more than `limit`."""
    most = 0
    for row in rows:
        found = distinct_values(row, limit)
        if found is None:
            return None
        most = max(most, found.size)
    return most


def _distinct(values: FloatArray) -> int | str:
    """The number of distinct values, or that they are many."""
    found = distinct_values(values, _COUNTED_VALUES)
    return f"> {_COUNTED_VALUES}" if found is None else found.size
