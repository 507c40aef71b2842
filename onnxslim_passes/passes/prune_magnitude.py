"""Makes the smallest weights zero.

Han, Pool, Tran, Dally: "Learning both Weights and Connections for Efficient Neural Networks",
NeurIPS 2015. What is zero for how much is set by `sparsity` (a fraction, of each weight or over all
of them) or by `threshold` (standard deviations of each weight, section 3 of the paper).

Only the multiplied weights of layers are pruned. A bias or a normalization parameter is a handful
of numbers that costs nothing to keep, and a zero in it changes its channel for every input.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import numpy.typing as npt
from pydantic import Field, model_validator

from onnxslim_passes.model import Model, Role, Weight
from onnxslim_passes.numerics.distortion import sqnr_db
from onnxslim_passes.numerics.sparsity import (
    Mask,
    apply_mask,
    deviation_mask,
    global_threshold,
    magnitude_mask,
    nonzero_count,
    pruned_count,
)
from onnxslim_passes.passes.base import Context, Decision, Pass, PassResult, Stage, pass_options
from onnxslim_passes.passes.quantized import stored_decisions
from onnxslim_passes.passes.selection import Selection, role_refusal, values_refusal

__all__ = ["PruneMagnitude"]

DEFAULT_SPARSITY = 0.5

_ROLES: frozenset[Role] = frozenset({"weight", "recurrent"})
_ROLES_AND_TABLES: frozenset[Role] = _ROLES | {"embedding"}


@pass_options
class PruneMagnitude(Selection, Pass):
    """Zeros by magnitude; shapes stay, so time stays, and the stored file shrinks."""

    name: ClassVar[str] = "prune-magnitude"
    stage: ClassVar[Stage] = Stage.PRUNE
    summary: ClassVar[str] = "the smallest weights become zero"
    references: ClassVar[tuple[str, ...]] = (
        "Han, Pool, Tran and Dally 2015, Learning both Weights and Connections for Efficient "
        "Neural Networks, arXiv:1506.02626",
    )

    sparsity: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="fraction of zeros to reach; 0.5 unless this or threshold is given",
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
    embeddings: Annotated[
        bool, Field(description="prune the tables of Gather, too: rows of rare words suffer")
    ] = False
    min_elements: Annotated[int, Field(ge=1, description="smaller weights are left alone")] = 512

    @model_validator(mode="after")
    def _one_measure(self) -> "PruneMagnitude":
        if self.threshold is not None and self.sparsity is not None:
            raise ValueError("threshold and sparsity exclude each other; give one of them")
        if self.threshold is not None and self.scope == "global":
            raise ValueError("threshold is counted in each weight's own deviations; drop scope")
        return self

    def preview(self, model: Model) -> tuple[Decision, ...]:
        """The candidates, without the work on them."""
        return tuple(
            self._refusal(weight) or Decision(where=weight.where, taken=True, reason="a candidate")
            for weight in model.weights()
        )

    def apply(self, model: Model, context: Context) -> PassResult:
        """Writes zeros; a decision for every weight of the model, in its order."""
        self.check(model)
        weights = model.weights()
        refusals = {weight: self._refusal(weight) for weight in weights}
        candidates = [weight for weight, refusal in refusals.items() if refusal is None]
        pruned: dict[Weight, Decision] = {}
        tracked = context.progress.track(candidates, self.name, len(candidates))
        for weight, mask in zip(tracked, self._masks(candidates), strict=True):
            pruned[weight] = self._prune(weight, mask)
        changed = any(decision.taken for decision in pruned.values())
        decisions = tuple(refusals[weight] or pruned[weight] for weight in weights)
        return PassResult(changed, (*decisions, *stored_decisions(model, "pruning")))

    def _refusal(self, weight: Weight) -> Decision | None:
        """Why a weight is not pruned whatever its numbers, or None."""
        refusal = role_refusal(weight, _ROLES_AND_TABLES if self.embeddings else _ROLES)
        return refusal or self.verdict(weight) or values_refusal(weight)

    def _masks(self, candidates: list[Weight]) -> Iterator[Mask]:
        """The mask of each candidate, made as it is asked for."""
        if self.threshold is not None:
            for weight in candidates:
                yield deviation_mask(weight.values, self.threshold)
        elif self.scope == "global":
            threshold = global_threshold(lambda: _values(candidates), self._target)
            yield from threshold.masks(_values(candidates))
        else:
            for weight in candidates:
                yield magnitude_mask(weight.values, self._target)

    @property
    def _target(self) -> float:
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

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
        reason = self._measure()
        if nonzero == 0:
            reason += "; nothing is left of it: exclude it, or ask for less"
        figures = _figures(size, nonzero) | {
            "nonzero_before": nonzero_before,
            "sqnr_db": round(sqnr_db(before, after), 2),
        }
        return Decision(where=weight.where, taken=True, reason=reason, figures=figures)

    def _measure(self) -> str:
        """What was pruned, in words."""
        if self.threshold is not None:
            return f"magnitudes below {self.threshold:g} standard deviations became zero"
        if self.scope == "global":
            return f"magnitudes among the smallest {self._target:.4g} of all weights became zero"
        return f"the smallest {self._target:.4g} of its magnitudes became zero"

    def _nothing_to_do(self, size: int, nonzero: int) -> str:
        if self.threshold is not None:
            return f"no element lies below {self.threshold:g} standard deviations"
        if self.scope == "global":
            return f"no element is among the smallest {self._target:.4g} of all weights"
        if size - nonzero >= pruned_count(size, self._target) > 0:
            return f"is as sparse as sparsity={self._target:.4g} asks for already"
        return f"sparsity={self._target:.4g} of {size} elements is none"


def _values(weights: list[Weight]) -> Iterator[npt.NDArray[Any]]:
    return (weight.values for weight in weights)


def _figures(size: int, nonzero: int) -> dict[str, int | float | str]:
    return {"sparsity": round(1 - nonzero / size, 6), "nonzero": nonzero, "elements": size}
