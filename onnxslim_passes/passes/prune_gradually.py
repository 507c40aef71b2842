"""Prunes while it trains: a few more zeros every few steps, until the final sparsity is reached.

Pruning at once and training afterwards cannot undo what was cut; rising sparsity lets the network
move what it needs out of the way. What is cut is decided by magnitude, by one threshold for all
weights, in each weight, or as far as each weight's own sensitivity allows.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from onnxslim_passes.calibration import Samples
from onnxslim_passes.errors import UsageError
from onnxslim_passes.model import Model, Weight
from onnxslim_passes.numerics.ramps import Ramp, shared_out
from onnxslim_passes.numerics.sparsity import nonzero_count, pruned_count
from onnxslim_passes.passes.base import (
    Bar,
    Context,
    Decision,
    Pass,
    PassResult,
    Stage,
    pass_options,
)
from onnxslim_passes.passes.overrides import NodeOverride, check_overrides, given
from onnxslim_passes.passes.selection import weight_names
from onnxslim_passes.training.constraints import Masked
from onnxslim_passes.training.journal import Journals
from onnxslim_passes.training.loop import Tuned, run_course
from onnxslim_passes.training.losses import check_loss
from onnxslim_passes.training.options import Course, Objective, Parameters, Update, options_as
from onnxslim_passes.training.parameters import Constraint, Free
from onnxslim_passes.training.program import find_constraints
from onnxslim_passes.training.pruning import GradualMasks, Targets
from onnxslim_passes.training.sensitivity import LEVELS, pruning_errors
from onnxslim_passes.training.trainer import Trainer
from onnxslim_passes.training.tuning import Session, prepare
from onnxslim_passes.training.writing_back import write_back

__all__ = ["GradualOverride", "PruneGradually"]

_SETTLED_SHARE = 0.6


@pass_options
class GradualOverride(NodeOverride):
    """Another final sparsity for some weights, which leave the common one."""

    sparsity: Annotated[
        float | None, Field(ge=0, lt=1, description="fraction of zeros; 0 leaves the weight")
    ] = None


@pass_options
class PruneGradually(Course, Objective, Update, Parameters, Pass):
    """Zeros by magnitude that grow in number while the weights are trained."""

    name: ClassVar[str] = "prune-gradually"
    stage: ClassVar[Stage] = Stage.PRUNE
    summary: ClassVar[str] = "weights become zero step by step while they are trained"
    references: ClassVar[tuple[str, ...]] = (
        "Han, Pool, Tran and Dally 2015, Learning both Weights and Connections for Efficient "
        "Neural Networks, arXiv:1506.02626",
        "Guo, Yao and Chen 2016, Dynamic Network Surgery for Efficient DNNs, arXiv:1608.04493",
        "Zhu and Gupta 2017, To prune, or not to prune, arXiv:1710.01878",
    )
    needs_training: ClassVar[bool] = True

    sparsity: Annotated[float, Field(gt=0, lt=1, description="fraction of zeros to end with")] = 0.9
    scope: Annotated[
        Literal["global", "weight", "sensitivity"],
        Field(
            description="one threshold for all weights, the sparsity in each weight, or a sparsity "
            "of each weight's own by how much the outputs change when it alone is pruned"
        ),
    ] = "global"
    ramp: Annotated[
        Ramp, Field(description="how the sparsity rises: cubic (most at first), linear, steps")
    ] = "cubic"
    ramp_epochs: Annotated[
        int | None,
        Field(ge=1, description="epochs in which it rises; by default three fifths of all"),
    ] = None
    prune_steps: Annotated[int, Field(ge=1, description="steps between decisions")] = 50
    regrow: Annotated[
        bool,
        Field(
            description="weights behind zeros keep moving and may come back while the sparsity "
            "rises (dynamic network surgery)"
        ),
    ] = False
    overrides: Annotated[
        tuple[GradualOverride, ...],
        Field(description="other final sparsities for some weights or nodes"),
    ] = ()
    min_elements: Annotated[
        int, Field(ge=1, description="smaller weights are trained but not pruned")
    ] = 512
    teacher: Annotated[
        bool,
        Field(description="learn from the model as the pipeline received it; without, from labels"),
    ] = True

    @model_validator(mode="after")
    def _time_to_rise(self) -> "PruneGradually":
        if self.epochs < self._settled:
            raise ValueError(
                f"ramp_epochs is {self.ramp_epochs}, epochs is {self.epochs}; the sparsity has to "
                "be reached by the end"
            )
        return self

    @property
    def _settled(self) -> int:
        """Epochs until the final sparsity is reached."""
        share = max(1, math.ceil(self.epochs * _SETTLED_SHARE))
        return share if self.ramp_epochs is None else self.ramp_epochs

    def requires(self, model: Model) -> None:
        """Raises if an option cannot be met."""
        check_overrides(self.overrides, model)
        check_loss(options_as(Objective, self), has_teacher=self.teacher)
        find_constraints(model, options_as(Parameters, self))

    def apply(self, model: Model, context: Context) -> PassResult:
        """Prunes and trains; a decision for every weight."""
        self.requires(model)
        samples = context.training or context.samples
        if samples is None:
            raise UsageError(
                "there is nothing to train on: give --training DATA (or --calibration), or "
                "training= in Python"
            )
        candidates, refused = self._candidates(model)
        if not candidates:
            return PassResult(False, refused)
        if self._is_done(candidates.values()):
            return PassResult(False, (*_as_sparse(candidates.values()), *refused))
        session = self._prepared(model, samples, context, candidates)
        held = [one for one in session.program.constraints if isinstance(one, Masked)]
        held = [one for one in held if one.where in candidates]
        targets = self._targets(model, [candidates[one.where] for one in held], samples, context)
        tuned = self._run(session, held, targets, context)
        written = write_back(model, session.program.constraints, tuned.state)
        told = tuple(_with_figures(written, model, set(candidates)))
        passed_over = (d for d in session.program.decisions if not d.taken)
        listed = {decision.where for decision in told}
        rest = [d for d in (*passed_over, *refused) if d.where not in listed]
        unique = {decision.where: decision for decision in rest}
        return PassResult(any(d.taken for d in written), (*told, *unique.values()))

    # ---- what is pruned

    def _candidates(self, model: Model) -> tuple[dict[str, Weight], tuple[Decision, ...]]:
        """The weights to prune, by place, and why the others are not."""
        constraints, decisions = find_constraints(model, options_as(Parameters, self))
        free = {one.where for one in constraints if isinstance(one, Free | Masked)}
        held = {one.where: one.kind for one in constraints}
        known = {decision.where for decision in decisions}
        candidates, refused = {}, list(decisions)
        for weight in model.weights():
            if weight.where in known:
                continue
            reason = self._objection(weight, held.get(weight.where, ""), weight.where in free)
            if reason:
                refused.append(Decision(where=weight.where, taken=False, reason=reason))
            else:
                candidates[weight.where] = weight
        return candidates, tuple(refused)

    def _objection(self, weight: Weight, kind: str, is_free: bool) -> str:
        if weight.role not in ("weight", "recurrent"):
            return "trained along, but not pruned: not the weight of a layer"
        if not is_free:
            return f"is held by a {kind or 'tie'}: prune before that is made"
        if weight.size < self.min_elements:
            return f"trained along, but has fewer elements than min_elements={self.min_elements}"
        if self._own(weight) == 0:
            return "trained along, but left unpruned by overrides"
        return ""

    def _own(self, weight: Weight) -> float | None:
        """The sparsity that an override gives."""
        found: float | None = given(self.overrides, weight_names(weight), "sparsity")
        return found

    def _is_done(self, weights: Iterable[Weight]) -> bool:
        """Whether there are as many zeros as asked for already."""
        rest_size = rest_zeros = 0
        for weight in weights:
            zeros, own = weight.size - nonzero_count(weight.values), self._own(weight)
            asked = self.sparsity if own is None else own
            alone = own is not None or self.scope == "weight"
            if alone and zeros < pruned_count(weight.size, asked):
                return False
            if not alone:
                rest_size, rest_zeros = rest_size + weight.size, rest_zeros + zeros
        # Shares of several weights are rounded one by one.
        return rest_zeros >= pruned_count(rest_size, self.sparsity) * (1 - 1e-3)

    def _targets(
        self, model: Model, weights: Sequence[Weight], samples: Samples, context: Context
    ) -> Targets:
        """The sparsity that each weight, or all together, are to end with."""
        alone = {weight.where: own for weight in weights if (own := self._own(weight)) is not None}
        rest = [weight for weight in weights if weight.where not in alone]
        if self.scope == "global":
            return Targets(self.sparsity, alone)
        if self.scope == "weight":
            return Targets(None, alone | {weight.where: self.sparsity for weight in rest})
        track = context.progress.track(range(len(rest)), "sensitivity", len(rest))
        errors = pruning_errors(model, [weight.name for weight in rest], samples, track)
        wanted = min(self.sparsity, LEVELS[-1])
        shares = shared_out([weight.size for weight in rest], LEVELS, errors, wanted)
        places = [weight.where for weight in rest]
        return Targets(None, alone | dict(zip(places, shares, strict=True)))

    # ---- the run

    def _prepared(
        self, model: Model, samples: Samples, context: Context, candidates: dict[str, Weight]
    ) -> Session:
        def hold(constraints: list[Constraint]) -> list[Constraint]:
            return [_masked(one, candidates, latent=self.regrow) for one in constraints]

        return prepare(
            model,
            samples,
            objective=options_as(Objective, self),
            update=options_as(Update, self),
            parameters=options_as(Parameters, self),
            course=options_as(Course, self),
            teacher=context.reference if self.teacher else None,
            seed=context.seed,
            hold=hold,
        )

    def _run(
        self, session: Session, held: Sequence[Masked], targets: Targets, context: Context
    ) -> Tuned:
        trainer = Trainer(session.program)
        masks = GradualMasks(
            trainer,
            held,
            targets,
            kind=self.ramp,
            steps=self._settled * (session.steps // max(1, self.epochs)),
            every=self.prune_steps,
        )
        bar = Bar(context.progress, self.name)

        def after_step(loss: float) -> None:
            masks.after_step()
            bar.advance()

        return run_course(
            trainer,
            session.data,
            session.validation,
            session.course,
            seed=session.seed,
            settling=self._settled,
            journals=self._journals(session, context),
            begin=lambda done: bar.start(session.steps, done),
            progress=after_step,
        )

    def _journals(self, session: Session, context: Context) -> Journals | None:
        """Where a killed run is taken up from: only one with the same options is."""
        told = json.dumps([session.fingerprint, self.to_table()])
        fingerprint = hashlib.sha256(told.encode()).hexdigest()
        path = context.checkpoint(fingerprint)
        return None if path is None else Journals(path, fingerprint)


def _masked(constraint: Constraint, candidates: dict[str, Weight], *, latent: bool) -> Constraint:
    """The constraint with a mask that can shrink, if its weight is to be pruned."""
    if constraint.where not in candidates:
        return constraint
    if isinstance(constraint, Masked):
        held, places, mask = constraint.constants, constraint.places, constraint.mask
    else:
        assert isinstance(constraint, Free)  # others are no candidates
        held, places = (constraint.constant,), (constraint.where,)
        mask = np.ones(constraint.constant.shape, np.bool_)
    return Masked(held, places, 0, mask, latent=latent)


def _as_sparse(weights: Iterable[Weight]) -> Iterator[Decision]:
    for weight in weights:
        nonzero = nonzero_count(weight.values)
        figures = {"nonzero": nonzero, "elements": weight.size}
        reason = "is as sparse as it is to be already; fine-tune trains what is left"
        yield Decision(where=weight.where, taken=False, reason=reason, figures=figures)


def _with_figures(
    written: Sequence[Decision], model: Model, pruned: set[str]
) -> Iterator[Decision]:
    """The decisions, with what became of pruned weights."""
    after = {weight.where: weight.values for weight in model.weights()}
    for decision in written:
        if decision.where not in pruned:
            yield decision
            continue
        values = after[decision.where]
        nonzero = int(np.count_nonzero(values))
        figures: dict[str, int | float | str] = {
            "sparsity": round(1 - nonzero / values.size, 6),
            "nonzero": nonzero,
            "elements": int(values.size),
        }
        reason = f"{nonzero} of {values.size} elements are left, trained"
        yield Decision(where=decision.where, taken=decision.taken, reason=reason, figures=figures)
