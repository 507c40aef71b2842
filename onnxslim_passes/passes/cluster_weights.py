"""Lets the elements of a weight share a few values.

Han, Mao, Dally: "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
Quantization and Huffman Coding", ICLR 2016, section 3: k-means on each weight; the centroids are
the shared values. This pass changes values only, in their own dtype; `store-weights` then finds
that there are few of them and stores indices of so many bits.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from onnxslim_passes.model import Model, Role, Weight
from onnxslim_passes.numerics.arrays import FloatArray, by_channel
from onnxslim_passes.numerics.bits import packed_bytes
from onnxslim_passes.numerics.clustering import distinct_values, kmeans_1d
from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.quantized import stored_decisions
from onnxslim_passes.passes.selection import Selection, role_refusal, values_refusal

__all__ = ["ClusterWeights"]

DEFAULT_BITS = 4

_ROLES: frozenset[Role] = frozenset({"weight", "recurrent", "embedding"})
# About what the nodes and tensor headers of a stored codebook take in the file.
_DECODER_BYTES = 128
# Counting distinct values stops here: a figure for the report, not worth a full sort.
_COUNTED_VALUES = 1 << 16


@pass_options
class ClusterWeights(Selection, Pass):
    """k-means on each weight, or on each of its output channels."""

    name: ClassVar[str] = "cluster-weights"
    stage: ClassVar[Stage] = Stage.CLUSTER
    summary: ClassVar[str] = "the elements of a weight share a few values"
    references: ClassVar[tuple[str, ...]] = (
        "Han, Mao and Dally 2016, Deep Compression: Compressing Deep Neural Networks with Pruning, "
        "Trained Quantization and Huffman Coding, arXiv:1510.00149",
    )

    bits: Annotated[
        int | None,
        Field(ge=1, le=8, description="2^bits shared values; 4 unless this or clusters is given"),
    ] = None
    clusters: Annotated[
        int | None, Field(ge=2, le=256, description="instead of bits: how many shared values")
    ] = None
    per: Annotated[
        Literal["tensor", "channel"],
        Field(description="one set of values for the tensor, or one for each output channel"),
    ] = "tensor"
    init: Annotated[
        Literal["linear", "density", "kmeans++"],
        Field(description="where centroids start: evenly over the range, at quantiles, or drawn"),
    ] = "linear"
    min_elements: Annotated[int, Field(ge=1, description="smaller weights are left alone")] = 512

    @model_validator(mode="after")
    def _one_size(self) -> "ClusterWeights":
        if self.bits is not None and self.clusters is not None:
            raise ValueError("bits and clusters exclude each other; give one of them")
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

    @property
    def _count(self) -> int:
        """K, the number of shared values."""
        if self.clusters is not None:
            return self.clusters
        return int(1 << (DEFAULT_BITS if self.bits is None else self.bits))

    def _refusal(self, weight: Weight) -> Decision | None:
        """Why a weight is not clustered, or None."""
        early = role_refusal(weight, _ROLES) or self.verdict(weight)
        return early or self._size_refusal(weight) or values_refusal(weight)

    def _axis(self, weight: Weight) -> int | None:
        return weight.channel_axis if self.per == "channel" else None

    def _size_refusal(self, weight: Weight) -> Decision | None:
        """A refusal where codebook and codes take no less than the weight itself."""
        axis = self._axis(weight)
        tables = 1 if axis is None else weight.shape[axis]
        index_bits = (self._count - 1).bit_length()
        stored = packed_bytes(weight.size, index_bits) + _DECODER_BYTES
        stored += tables * self._count * weight.dtype.itemsize
        if stored < weight.size * weight.dtype.itemsize:
            return None
        held = f"{tables} tables of {self._count} values" if axis is not None else "the table"
        reason = f"{held} and {weight.size} indices of {index_bits} bits take no less than it does"
        return Decision(where=weight.where, taken=False, reason=reason)

    def _cluster(self, weight: Weight, seed: int) -> Decision:
        """Clusters one weight, unless it has so few values already."""
        before, axis, count = weight.values, self._axis(weight), self._count
        if _is_clustered(before, axis, count):
            reason = f"has no more than {count} values already"
            if axis is not None:
                reason = f"no channel has more than {count} values already"
            figures = {"distinct": _distinct(before)}
            return Decision(where=weight.where, taken=False, reason=reason, figures=figures)
        book = kmeans_1d(before, count, axis=axis, init=self.init, seed=seed)
        after = book.values()
        weight.values = after
        return Decision(
            where=weight.where,
            taken=True,
            reason=self._what_was_done(axis, book.clusters),
            figures={
                "clusters": book.clusters,
                "bits": book.bits,
                "distinct_before": _distinct(before),
                "distinct": _distinct(after),
                "sqnr_db": round(sqnr_db(before, after), 2),
            },
        )

    def _what_was_done(self, axis: int | None, clusters: int) -> str:
        if axis is not None:
            return f"each channel along axis {axis} shares {clusters} values"
        reason = f"its elements share {clusters} values"
        if self.per == "channel":
            reason += "; its uses agree on no channel axis, so one set for the tensor"
        return reason


def _is_clustered(values: FloatArray, axis: int | None, count: int) -> bool:
    rows = [values] if axis is None else by_channel(values, axis)
    return all(distinct_values(row, count) is not None for row in rows)


def _distinct(values: FloatArray) -> int | str:
    """The number of distinct values, or that they are many."""
    found = distinct_values(values, _COUNTED_VALUES)
    return f"> {_COUNTED_VALUES}" if found is None else found.size
