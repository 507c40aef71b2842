"""Trains what compression left of the weights, on the user's data and on stock ONNX Runtime.

The step (forward, loss, backward, optimizer) is itself an ONNX graph; see
`onnxslim_passes.training`. The teacher is the model as the pipeline received it, so that samples
without labels are enough.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from onnxslim_passes.errors import UnsupportedModelError, UsageError
from onnxslim_passes.model import Model
from onnxslim_passes.passes.base import (
    Bar,
    Context,
    Decision,
    Pass,
    PassResult,
    Stage,
    pass_options,
)
from onnxslim_passes.training.losses import LABEL_LOSSES, check_loss, check_teacher_options
from onnxslim_passes.training.options import Course, Objective, Parameters, Update, options_as
from onnxslim_passes.training.program import (
    find_constraints,
    has_integer_weights,
    nothing_to_train,
)
from onnxslim_passes.training.trainer import Trainer
from onnxslim_passes.training.tuning import Listener, Session, prepare, run
from onnxslim_passes.training.writing_back import write_back

__all__ = ["FineTune"]

# A distance of this size is that of float sums in another order: there is nothing to learn.
_NO_DISTANCE = 1e-9


@pass_options
class FineTune(Course, Objective, Update, Parameters, Pass):
    """Recovers what pruning, clustering or quantizing cost, within what they made of the weights.

    The epoch that validates best is kept; if none is better than the model as it came, nothing
    changes.
    """

    name: ClassVar[str] = "fine-tune"
    stage: ClassVar[Stage] = Stage.TUNE
    summary: ClassVar[str] = "weights are trained again, within masks, codebooks and grids"
    references: ClassVar[tuple[str, ...]] = (
        "Han, Mao and Dally 2016, Deep Compression, arXiv:1510.00149",
        "Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, "
        "arXiv:1503.02531",
    )
    needs_training: ClassVar[bool] = True

    teacher: Annotated[
        bool,
        Field(description="learn from the model as the pipeline received it; without, from labels"),
    ] = True

    def requires(self, model: Model) -> None:
        """Raises if there is no weight to train, or an option cannot be met."""
        check_loss(self._objective, has_teacher=self.teacher)
        check_teacher_options(self._objective, has_teacher=self.teacher)
        constraints, decisions = find_constraints(model, options_as(Parameters, self))
        if not constraints and has_integer_weights(model):
            raise UnsupportedModelError(nothing_to_train(model, decisions))

    @property
    def _objective(self) -> Objective:
        return options_as(Objective, self)

    def preview(self, model: Model) -> tuple[Decision, ...]:
        """The weights that would be trained, as far as the data does not decide it."""
        constraints, decisions = find_constraints(model, options_as(Parameters, self))
        return (
            *(Decision(where=c.where, taken=True, reason="a candidate") for c in constraints),
            *decisions,
        )

    def apply(self, model: Model, context: Context) -> PassResult:
        """Trains, and writes the tuned values back; a decision for every weight."""
        samples = context.training or context.samples
        if samples is None:
            raise UsageError(
                "there is nothing to train on: give --training DATA (or --calibration), or "
                "training= in Python"
            )
        parameters = options_as(Parameters, self)
        constraints, decisions = find_constraints(model, parameters)
        if not constraints:
            return PassResult(False, tuple(decisions))
        session = prepare(
            model,
            samples,
            objective=self._objective,
            update=options_as(Update, self),
            parameters=parameters,
            course=options_as(Course, self),
            teacher=context.reference if self.teacher else None,
            seed=context.seed,
        )
        passed_over = tuple(d for d in session.program.decisions if not d.taken)
        if self._is_done(session):
            return PassResult(False, (*_nothing_to_learn(session), *passed_over))
        checkpoint = context.checkpoint(session.fingerprint)
        tuned = run(session, checkpoint=checkpoint, listener=_shown(context))
        written = write_back(model, session.program.constraints, tuned.state)
        changed = any(decision.taken for decision in written)
        return PassResult(changed, (*written, *passed_over))

    def _is_done(self, session: Session) -> bool:
        """Whether the outputs are the teacher's already, so that there is nothing to recover."""
        loss = session.program.layout.options["objective"]["loss"]
        if loss in LABEL_LOSSES or session.validation is None:
            return False
        found = Trainer(session.program).evaluate(session.validation, session.batch_size)
        return abs(found.loss) < _NO_DISTANCE


def _nothing_to_learn(session: Session) -> tuple[Decision, ...]:
    reason = "left as it is: the outputs are those of the original already"
    return tuple(
        Decision(where=constraint.where, taken=False, reason=reason)
        for constraint in session.program.constraints
    )


def _shown(context: Context) -> Listener:
    """Shows the steps as a bar."""
    bar = Bar(context.progress, FineTune.name)
    return Listener(on_start=bar.start, on_step=lambda loss: bar.advance())
