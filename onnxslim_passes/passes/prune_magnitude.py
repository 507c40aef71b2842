"""Makes the smallest weights zero.

Han, Pool, Tran, Dally: "Learning both Weights and Connections for Efficient Neural Networks",
NeurIPS 2015. What is zero for how much is set by `sparsity` (a fraction, of each weight or over all
of them), by `threshold` (standard deviations of each weight, section 3 of the paper) or by
`n_of_m` (N kept of M neighbours along the input channels). With `block`, whole blocks go.

Only the multiplied weights of layers are pruned. A bias or a normalization parameter is a handful
of numbers that costs nothing to keep, and a zero in it changes its channel for every input.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy.typing as npt
from pydantic import Field, model_validator

from onnxslim_passes.model import Model, Role, Weight
from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.numerics.sparsity import (
    Mask,
    apply_mask,
    block_norms,
    deviation_mask,
    global_threshold,
    magnitude_mask,
    n_of_m_mask,
    nonzero_count,
    pruned_count,
    spread_mask,
)
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.overrides import NodeOverride, check_overrides, given
from onnxslim_passes.passes.quantized import stored_decisions
from onnxslim_passes.passes.selection import (
    Selection,
    role_refusal,
    values_refusal,
    weight_names,
)

__all__ = ["PruneMagnitude", "PruneOverride"]

DEFAULT_SPARSITY = 0.5

_ROLES: frozenset[Role] = frozenset({"weight", "recurrent"})
_ROLES_AND_TABLES: frozenset[Role] = _ROLES | {"embedding"}
_N_OF_M = re.compile(r"([1-9]\d*):([1-9]\d*)")


@pass_options
class PruneOverride(NodeOverride):
    """Another measure of `prune-magnitude` for some weights, which leave the common threshold."""

    sparsity: Annotated[
        float | None, Field(ge=0, lt=1, description="fraction of zeros; 0 leaves the weight")
    ] = None
    threshold: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="as of the pass")
    ] = None

    @model_validator(mode="after")
    def _one_measure(self) -> "PruneOverride":
        if self.sparsity is not None and self.threshold is not None:
            raise ValueError(
                f"the override of {self.nodes!r} has sparsity and threshold; give one of them"
            )
        return self


@pass_options
class PruneMagnitude(Selection, Pass):
    """Zeros by magnitude; shapes stay, so time stays, and the stored file shrinks."""

    name: ClassVar[str] = "prune-magnitude"
    stage: ClassVar[Stage] = Stage.PRUNE
    summary: ClassVar[str] = "the smallest weights become zero"
    references: ClassVar[tuple[str, ...]] = (
        "Han, Pool, Tran and Dally 2015, Learning both Weights and Connections for Efficient "
        "Neural Networks, arXiv:1506.02626",
        "Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378 (2:4)",
    )

    sparsity: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="fraction of zeros to reach; 0.5 unless this, threshold or n_of_m is given",
        ),
    ] = None
    scope: Annotated[
        Literal["weight", "global"],
        Field(description="whether each weight reaches the sparsity, or all weights together"),
    ] = "weight"
    threshold: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="instead of sparsity: standard deviations of a weight below which its "
            "elements become zero",
        ),
    ] = None
    n_of_m: Annotated[
        str,
        Field(
            description="instead of sparsity: N:M, such as 2:4, keeps the N largest of each M "
            "neighbours along the input channels"
        ),
    ] = ""
    block: Annotated[
        tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
        Field(
            description="output and input channels of a block that goes or stays whole, kernels "
            "included"
        ),
    ] = (1, 1)
    overrides: Annotated[
        tuple[PruneOverride, ...],
        Field(description="other sparsities or thresholds for some weights or nodes"),
    ] = ()
    embeddings: Annotated[
        bool, Field(description="prune the tables of Gather, too: rows of rare words suffer")
    ] = False
    min_elements: Annotated[int, Field(ge=1, description="smaller weights are left alone")] = 512

    @model_validator(mode="after")
    def _one_measure(self) -> "PruneMagnitude":
        given = [self.sparsity is not None, self.threshold is not None, bool(self.n_of_m)]
        if sum(given) > 1:
            raise ValueError("sparsity, threshold and n_of_m exclude each other; give one of them")
        if self.threshold is not None and self.scope == "global":
            raise ValueError("threshold is counted in each weight's own deviations; drop scope")
        if self.n_of_m and self.scope == "global":
            raise ValueError("n_of_m holds in every group of M; drop scope")
        if self.in_blocks and (self.n_of_m or self.threshold is not None):
            raise ValueError("block goes with sparsity; drop n_of_m or threshold")
        return self

    @model_validator(mode="after")
    def _n_below_m(self) -> "PruneMagnitude":
        if self.n_of_m and not self._group:
            raise ValueError(f"n_of_m is {self.n_of_m!r}; expected N:M with 0 < N < M, such as 2:4")
        return self

    @property
    def in_blocks(self) -> bool:
        """Whether blocks of more than one channel pair go whole."""
        return self.block != (1, 1)

    @property
    def _group(self) -> tuple[int, int] | None:
        """N and M, or None if they are not given or make no sense."""
        match = _N_OF_M.fullmatch(self.n_of_m)
        kept, of = (int(match[1]), int(match[2])) if match else (0, 0)
        return (kept, of) if kept < of else None

    def preview(self, model: Model) -> tuple[Decision, ...]:
        """The candidates, without the work on them."""
        return tuple(
            self._refusal(weight) or Decision(where=weight.where, taken=True, reason="a candidate")
            for weight in model.weights()
        )

    def apply(self, model: Model, context: Context) -> PassResult:
        """Writes zeros; a decision for every weight of the model, in its order."""
        self.check(model)
        check_overrides(self.overrides, model)
        weights = model.weights()
        refusals = {weight: self._refusal(weight) for weight in weights}
        candidates = [weight for weight, refusal in refusals.items() if refusal is None]
        pruned: dict[Weight, Decision] = {}
        tracked = context.progress.track(candidates, self.name, len(candidates))
        for weight, mask in zip(tracked, self._masks(candidates), strict=True):
            pruned[weight] = self._for(weight)._prune(weight, mask)
        changed = any(decision.taken for decision in pruned.values())
        decisions = tuple(refusals[weight] or pruned[weight] for weight in weights)
        return PassResult(changed, (*decisions, *stored_decisions(model, "pruning")))

    def _refusal(self, weight: Weight) -> Decision | None:
        """Why a weight is not pruned whatever its numbers, or None."""
        refusal = role_refusal(weight, _ROLES_AND_TABLES if self.embeddings else _ROLES)
        refusal = refusal or self.verdict(weight)
        asked = self._for(weight)
        if refusal is None and (asked.n_of_m or asked.in_blocks) and weight.input_axis is None:
            reason = "has no one axis of output channels, to which blocks and groups refer"
            refusal = Decision(where=weight.where, taken=False, reason=reason)
        return refusal or values_refusal(weight)

    def _for(self, weight: Weight) -> "PruneMagnitude":
        """The same for one weight, whose own measure counts."""
        names = weight_names(weight)
        sparsity, threshold = (given(self.overrides, names, k) for k in ("sparsity", "threshold"))
        if sparsity is None and threshold is None:
            return self
        alone = replace(self, overrides=(), n_of_m="", threshold=None, scope="weight")
        if sparsity is not None:
            return replace(alone, sparsity=sparsity)
        return replace(alone, sparsity=None, threshold=threshold, block=(1, 1))

    # ---- masks

    def _masks(self, candidates: list[Weight]) -> Iterator[Mask]:
        """The mask of each candidate, made as it is asked for."""
        alone = {weight: self._for(weight) for weight in candidates}
        together = [weight for weight in candidates if alone[weight].scope == "global"]
        masks: Iterator[Mask] = iter(())
        if together:
            threshold = global_threshold(lambda: map(self._scores, together), self._target)
            masks = threshold.masks(map(self._scores, together))
        for weight in candidates:
            if alone[weight].scope == "global":
                yield self._spread(weight, next(masks))
            else:
                yield alone[weight]._mask(weight)

    def _mask(self, weight: Weight) -> Mask:
        """The mask of a weight by itself."""
        if self._group is not None:
            return n_of_m_mask(weight.values, *self._group, _input_axis(weight))
        if self.threshold is not None:
            return deviation_mask(weight.values, self.threshold)
        return self._spread(weight, magnitude_mask(self._scores(weight), self._target))

    def _scores(self, weight: Weight) -> npt.NDArray[Any]:
        """What is compared: elements, or norms of blocks."""
        if not self.in_blocks:
            return weight.values
        return block_norms(weight.values, self.block, _axes(weight))

    def _spread(self, weight: Weight, mask: Mask) -> Mask:
        """The mask of the elements from that of the scores."""
        if not self.in_blocks:
            return mask
        return spread_mask(mask, self.block, _axes(weight), weight.shape)

    @property
    def _target(self) -> float:
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    # ---- the edit and the account

    def _prune(self, weight: Weight, mask: Mask) -> Decision:
        """Applies a mask, unless it prunes nothing but zeros."""
        before = weight.values
        size, nonzero_before = before.size, nonzero_count(before)
        after = apply_mask(before, mask)
        nonzero = nonzero_count(after)
        if nonzero == nonzero_before:
            return Decision(
                where=weight.where,
                taken=False,
                reason=self._nothing_to_do(size, nonzero),
                figures=_figures(size, nonzero),
            )
        weight.values = after
        reason = self._what()
        if nonzero == 0:
            reason += "; nothing is left of it: exclude it, or ask for less"
        figures = _figures(size, nonzero) | {
            "nonzero_before": nonzero_before,
            "sqnr_db": round(sqnr_db(before, after), 2),
        }
        return Decision(where=weight.where, taken=True, reason=reason, figures=figures)

    def _what(self) -> str:
        """What was pruned, in words."""
        things = self._things("magnitudes")
        if self._group is not None:
            return f"all but {self._group[0]} of every {self._group[1]} input channels became zero"
        if self.threshold is not None:
            return f"magnitudes below {self.threshold:g} standard deviations became zero"
        if self.scope == "global":
            return f"{things} among the smallest {self._target:.4g} of all weights became zero"
        return f"the smallest {self._target:.4g} of its {things} became zero"

    def _nothing_to_do(self, size: int, nonzero: int) -> str:
        if self._group is not None:
            return f"has no more than {self._group[0]} of every {self._group[1]} already"
        if self.threshold is not None:
            return f"no element lies below {self.threshold:g} standard deviations"
        if self.scope == "global":
            thing = "block" if self.in_blocks else "element"
            return f"no {thing} is among the smallest {self._target:.4g} of all weights"
        if size - nonzero >= pruned_count(size, self._target) > 0:
            return f"is as sparse as sparsity={self._target:.4g} asks for already"
        return f"sparsity={self._target:.4g} of {size} {self._things('elements')} is none"

    def _things(self, elements: str) -> str:
        return f"{self.block[0]}x{self.block[1]} blocks" if self.in_blocks else elements


def _input_axis(weight: Weight) -> int:
    axis = weight.input_axis
    assert axis is not None  # others were refused
    return axis


def _axes(weight: Weight) -> tuple[int, int]:
    """Output and input axis of a candidate."""
    assert weight.channel_axis is not None  # others were refused
    return weight.channel_axis, _input_axis(weight)


def _figures(size: int, nonzero: int) -> dict[str, int | float | str]:
    return {"sparsity": round(1 - nonzero / size, 6), "nonzero": nonzero, "elements": size}
