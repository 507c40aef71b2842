"""Lets the elements of a weight share a few values.

Han, Mao, Dally: "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
Quantization and Huffman Coding", ICLR 2016, section 3: k-means on each weight; the centroids are
the shared values. This pass changes values only, in their own dtype; `store-weights` then finds
that there are few of them and stores indices of so many bits.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from onnxslim_passes.model import Constant, Model, Role, Weight
from onnxslim_passes.numerics.arrays import FloatArray
from onnxslim_passes.numerics.clustering import Init
from onnxslim_passes.numerics.distortion import sqnr_db, weighted_sqnr_db
from onnxslim_passes.numerics.histograms import distinct_values
from onnxslim_passes.numerics.weight_formats import BlockLayout, block_layout
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.input_moments import input_importance
from onnxslim_passes.passes.quantized import stored_decisions
from onnxslim_passes.passes.selection import Selection, role_refusal, values_refusal
from onnxslim_passes.passes.shared_values import (
    MOST_VALUES,
    Form,
    Method,
    OneTable,
    OwnTables,
    Shared,
    Vectors,
)

__all__ = ["ClusterWeights"]

Array = npt.NDArray[Any]

DEFAULT_BITS = 4
MOST_BITS = 8

_ROLES: frozenset[Role] = frozenset({"weight", "recurrent", "embedding"})
# Counting distinct values stops here: a figure for the report, not worth a full sort.
_COUNTED_VALUES = 1 << 16
_DEFAULT_BLOCK = 1024


@pass_options
class ClusterWeights(Selection, Pass):
    """k-means or a Gaussian mixture on each weight, or on parts of it; vectors of weights."""

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
        "Chou, Lookabaugh and Gray 1989, Entropy-Constrained Vector Quantization, IEEE Trans. "
        "ASSP 37(1) (rate_weight)",
        "Choi, El-Khamy and Lee 2017, Towards the Limit of Network Quantization, arXiv:1612.01543",
        "Stock et al. 2020, And the Bit Goes Down: Revisiting the Quantization of Neural Networks, "
        "arXiv:1907.05686 (groups)",
        "Kim et al. 2024, SqueezeLLM: Dense-and-Sparse Quantization, arXiv:2306.07629",
    )

    bits: Annotated[
        int | None,
        Field(
            ge=1,
            le=MOST_BITS,
            description="bits an element: 2^bits shared values, or 2^(bits*group) groups; 4, "
            "or as many as an index of 8 bits allows, if no size is given",
        ),
    ] = None
    clusters: Annotated[
        int | None,
        Field(
            ge=2, le=MOST_VALUES, description="instead of bits: how many shared values or groups"
        ),
    ] = None
    sqnr_db: Annotated[
        float | None,
        Field(
            gt=0,
            description="instead of bits: the fewest with this signal-to-noise ratio, per weight; "
            "of the layer's output where errors count by inputs",
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
        Method,
        Field(description="kmeans: least squared error; gmm: means of a Gaussian mixture"),
    ] = "kmeans"
    per: Annotated[
        Literal["tensor", "channel", "block"],
        Field(description="what has a set of values of its own: tensor, output channel, or block"),
    ] = "tensor"
    scales: Annotated[
        Literal["none", "channel", "block"],
        Field(
            description="the shared values are int8 numbers, times a scale of the channel or block"
        ),
    ] = "none"
    group: Annotated[
        Literal[1, 2, 4, 8],
        Field(description="neighbouring elements of a channel that share one index"),
    ] = 1
    block_size: Annotated[
        int, Field(ge=8, description="elements of a block of a channel, for per or scales=block")
    ] = _DEFAULT_BLOCK
    init: Annotated[
        Init,
        Field(
            description="where centroids start: at the optimum, evenly over the range (and settle "
            "near there: large weights keep values of their own), at quantiles, or drawn"
        ),
    ] = "optimal"
    rate_weight: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="how much a bit of an entropy code counts, in squared error as a part of "
            "the mean square of the weights: fewer and more frequent values; errors then all "
            "count alike. 0: least squared error",
        ),
    ] = 0.0
    weighting: Annotated[
        Literal["inputs", "none"],
        Field(
            description="inputs: where samples are given, an error counts with the mean square of "
            "what the element is multiplied with; none: all errors count alike"
        ),
    ] = "inputs"
    min_elements: Annotated[int, Field(ge=1, description="smaller weights are left alone")] = 512

    @model_validator(mode="after")
    def _fits_together(self) -> "ClusterWeights":
        sizes = ("bits", "clusters", "sqnr_db", "max_error")
        given = [name for name in sizes if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
        for clash, message in self._clashes():
            if clash:
                raise ValueError(message)
        return self

    def _clashes(self) -> tuple[tuple[bool, str], ...]:
        """Options that do not go together."""
        one_table = self.group > 1 or self.scales != "none"
        plain = self.method == "kmeans" and self.init == "optimal"
        return (
            (
                self.max_error is not None and not plain,
                "max_error has a k-means of its own; leave method and init out",
            ),
            (
                self.max_error is not None and one_table,
                "max_error is for single values without scales; use sqnr_db",
            ),
            (
                self.method == "gmm" and one_table,
                "method=gmm is for single values without scales",
            ),
            (
                self.rate_weight > 0 and (one_table or self.method == "gmm"),
                "rate_weight is for k-means of single values without scales",
            ),
            (
                self.rate_weight > 0 and self.max_error is not None,
                "max_error has a k-means of its own; leave rate_weight out",
            ),
            (
                self.per != "tensor" and one_table,
                f"per={self.per} gives each its own table, group and scales are for one table",
            ),
            (
                self.group > 1 and self.init != "optimal",
                "init is for single values; groups start from k-means++",
            ),
            (
                (self.bits or 1) * self.group > MOST_BITS,
                f"bits={self.bits} for groups of {self.group} needs indices of more than "
                f"{MOST_BITS} bits; use fewer bits or a smaller group",
            ),
            (
                self.block_size != _DEFAULT_BLOCK and "block" not in (self.per, self.scales),
                "block_size is for per=block or scales=block",
            ),
        )

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
        refusals = {weight.constant: self._refusal(weight) for weight in weights}
        importance: dict[Constant, Array] = {}
        by_inputs = self.weighting == "inputs" and not self.rate_weight
        if context.samples is not None and by_inputs:
            candidates = [weight for weight in weights if refusals[weight.constant] is None]
            importance = input_importance(model, candidates, context.samples, context.progress)
        decisions = tuple(
            refusals[weight.constant]
            or self._cluster(weight, context.seed, importance.get(weight.constant))
            for weight in context.progress.track(weights, self.name, len(weights))
        )
        changed = any(decision.taken for decision in decisions)
        return PassResult(changed, (*decisions, *stored_decisions(model, "clustering")))

    # ---- which weights

    @property
    def _count(self) -> int | None:
        """K, the number of shared values or groups, or None if a target decides."""
        if self.sqnr_db is not None or self.max_error is not None:
            return None
        if self.clusters is not None:
            return self.clusters
        bits = min(DEFAULT_BITS, MOST_BITS // self.group) if self.bits is None else self.bits
        return int(1 << (bits * self.group))

    def _refusal(self, weight: Weight) -> Decision | None:
        """Why a weight is not clustered, or None."""
        early = role_refusal(weight, _ROLES) or self.verdict(weight)
        return early or self._size_refusal(weight) or values_refusal(weight)

    def _form(self, weight: Weight, seed: int = 0) -> Form | str:
        """How it shares values, or why it cannot."""
        layout = self._layout(weight)
        if layout.block % self.group:
            return (
                f"group={self.group} does not divide the {layout.block} elements of "
                f"{'a channel' if layout.axis is not None else 'the weight'}"
            )
        if self.scales != "none":
            if weight.dtype == np.dtype(ml_dtypes.bfloat16):
                return "scales times int8 numbers are not exact in bfloat16; use scales=none"
            return OneTable(layout, seed, self.init, self.group)
        if self.group > 1:
            return Vectors(layout, seed, length=self.group)
        return OwnTables(layout, seed, self.init, self.method, self.rate_weight)

    def _layout(self, weight: Weight) -> BlockLayout:
        """How it is cut into rows."""
        shape = weight.shape
        axis = weight.channel_axis if shape else None
        unit = self.per if self.scales == "none" else self.scales
        if unit == "block":
            return block_layout(shape, axis, self.block_size)
        if unit == "channel":
            return block_layout(shape, axis)
        channels = block_layout(shape, axis)
        # Groups stay within channels where they can: their elements have more in common.
        if self.group > 1 and channels.block % self.group == 0:
            return channels
        return block_layout(shape, None)

    def _size_refusal(self, weight: Weight) -> Decision | None:
        """A refusal where codebook and codes take no less than the weight itself."""
        if not weight.size:
            return Decision(where=weight.where, taken=False, reason="has no elements")
        form, count = self._form(weight), self._count or 2
        if isinstance(form, str):
            return Decision(where=weight.where, taken=False, reason=form)
        if form.stored_bytes(count, weight.dtype.itemsize) < weight.size * weight.dtype.itemsize:
            return None
        bits = (count - 1).bit_length()
        tables = form.layout.blocks if isinstance(form, OwnTables) else 1
        held = "the table" if tables == 1 else f"{tables} tables of {count} values"
        if isinstance(form, OneTable):
            held += f", {form.layout.blocks} scales"
        indices = f"{weight.size // form.group} indices of {bits} bits"
        reason = f"{held} and {indices} take no less than it does"
        return Decision(where=weight.where, taken=False, reason=reason)

    # ---- the work

    def _cluster(self, weight: Weight, seed: int, importance: Array | None) -> Decision:
        """Clusters one weight, unless it has so few values already."""
        form = self._form(weight, seed)
        assert isinstance(form, Form)  # others are refused before
        rows = form.layout.cut(weight.values)
        few = self._already(weight, form, rows)
        if few is not None:
            return few
        counted = None
        if importance is not None:
            counted = form.layout.cut(np.broadcast_to(importance, weight.shape))
        found = self._shared(form, rows, counted)
        where, before = weight.where, weight.values
        if found is None:
            return Decision(where=where, taken=False, reason=self._unreachable())
        if form.stored_bytes(found.clusters, weight.dtype.itemsize) >= before.nbytes:
            reason = (
                f"needs {found.clusters} values, whose tables and indices take no less than it does"
            )
            return Decision(where=where, taken=False, reason=reason)
        after = form.layout.join(found.rows)
        weight.values = after
        reason = form.words(found.clusters)
        if "channel" in (self.per, self.scales) and form.layout.axis is None:
            reason += "; its uses agree on no channel axis"
        figures: dict[str, int | float | str] = {
            "clusters": found.clusters,
            "bits": round((found.clusters - 1).bit_length() / form.group, 3),
            "distinct_before": _distinct(before),
            "distinct": _distinct(after),
            "sqnr_db": round(sqnr_db(before, after), 2),
        }
        if self.rate_weight:
            reason += f"; a bit of code counts {self.rate_weight} of the mean square"
            figures["entropy_bits"] = round(_entropy_bits(after), 3)
        if counted is not None:
            reason += "; errors counted by its inputs"
            figures["output_sqnr_db"] = round(weighted_sqnr_db(rows, found.rows, counted), 2)
        return Decision(where=where, taken=True, reason=reason, figures=figures)

    def _already(self, weight: Weight, form: Form, rows: FloatArray) -> Decision | None:
        """A refusal of a weight that has few values, or None."""
        present = form.present(rows, self._count or MOST_VALUES)
        if present is None:
            return None
        stored = form.stored_bytes(present, weight.dtype.itemsize)
        if self._count is None and stored >= weight.size * weight.dtype.itemsize:
            return None
        limit = present if self._count is None else self._count
        values = "values" if form.group == 1 else f"groups of {form.group} values"
        reason = f"has no more than {limit} {values} already"
        if isinstance(form, OwnTables) and form.layout.blocks > 1:
            reason = f"no {self.per} has more than {limit} values already"
        figures = {"distinct": _distinct(weight.values)}
        return Decision(where=weight.where, taken=False, reason=reason, figures=figures)

    def _shared(self, form: Form, rows: FloatArray, importance: Array | None) -> Shared | None:
        """Rows of shared values; None if the target is out of reach."""
        if self._count is not None:
            return form.share(rows, self._count, importance)

        def attempt(bits: int) -> Shared | None:
            if self.max_error is not None:
                assert isinstance(form, OwnTables)  # other options are refused
                return form.within(rows, 1 << bits, self.max_error, importance)
            found = form.share(rows, 1 << bits, importance)
            reached = sqnr_db(rows, found.rows)
            if importance is not None:
                reached = weighted_sqnr_db(rows, found.rows, importance)
            return found if reached >= (self.sqnr_db or 0) else None

        return _fewest_bits(attempt)

    def _unreachable(self) -> str:
        wanted = f"max_error={self.max_error}"
        if self.sqnr_db is not None:
            wanted = f"sqnr_db={self.sqnr_db}"
        return f"indices of {MOST_BITS} bits do not hold {wanted}"


def _fewest_bits(attempt: Callable[[int], Shared | None]) -> Shared | None:
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


def _entropy_bits(values: FloatArray) -> float:
    """Bits an element in an ideal code of order 0."""
    shares = np.unique(values, return_counts=True)[1] / values.size
    return float(-(shares * np.log2(shares)).sum())


def _distinct(values: FloatArray) -> int | str:
    """The number of distinct values, or that they are many."""
    found = distinct_values(values, _COUNTED_VALUES)
    return f"> {_COUNTED_VALUES}" if found is None else found.size
