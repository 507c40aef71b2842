"""What training is told: the objective, the optimizer, which weights move, the course of a run.

Each group is a frozen keyword-only dataclass that checks itself. The pass `fine-tune` inherits the
groups, and the commands `fine-tune` and `train-graph` take them as they are, so that an option is
declared, checked and described in one place.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses
from pydantic import Field, model_validator

__all__ = [
    "Course",
    "Objective",
    "Parameters",
    "Update",
    "first_changed",
    "options_as",
    "training_options",
]

Options = TypeVar("Options", bound=type)
Group = TypeVar("Group")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def training_options(cls: Options) -> Options:
    """Makes annotated fields checked options, and lists them in the docstring for ``--help``."""
    config = pydantic.ConfigDict(extra="forbid", validate_default=True)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)
    lines = [f"    {name}: {field.description}" for name, field in made.__pydantic_fields__.items()]
    made.__doc__ = "\n".join([f"{cls.__doc__}\n\nAttributes:", *lines])
    return made  # type: ignore[no-any-return]  # the decorator returns the class it was given


def options_as(kind: type[Group], holder: Any) -> Group:
    """The options of one group, out of a holder that has them among others."""
    declared = fields(kind)  # type: ignore[arg-type]  # every group is a dataclass
    return kind(**{field.name: getattr(holder, field.name) for field in declared})


def first_changed(kind: type[Any], holder: Any, names: Iterable[str]) -> str | None:
    """The first of some options of a group that is not as it is by default, or None."""
    defaults = {field.name: field.default for field in fields(kind)}
    return next((name for name in names if getattr(holder, name) != defaults[name]), None)


@training_options
class Objective:
    """What is made smaller."""

    loss: Annotated[
        str,
        Field(
            description="auto, cross-entropy, mse, l1, cosine, bce, ctc, distill or "
            "file.py:function; auto takes cross-entropy for integer labels, mse for others, "
            "distill without labels"
        ),
    ] = "auto"
    output: Annotated[
        str | None,
        Field(description="tensor that the loss is on; by default the first output of numbers"),
    ] = None
    class_axis: Annotated[
        int | None,
        Field(
            description="axis of the classes; by default that of the final Softmax, else 1 for "
            "images and 2-D outputs, the last for sequences"
        ),
    ] = None
    soft_labels: Annotated[
        bool, Field(description="labels are a distribution over the classes, not class numbers")
    ] = False
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="share of each label that is spread over all classes")
    ] = 0.0
    distill_weight: Annotated[
        float,
        Field(ge=0, le=1, description="share of the distance from a teacher in a loss with labels"),
    ] = 0.5
    temperature: Annotated[
        float, Field(gt=0, description="divides the logits that are compared with a teacher's")
    ] = 2.0
    distance: Annotated[
        Literal["auto", "kl", "mse", "cosine"],
        Field(
            description="how far from the teacher: divergence of the class probabilities, relative "
            "squared error, or angle; auto takes kl behind a Softmax or with a loss on classes"
        ),
    ] = "auto"
    distill_tensors: Annotated[
        tuple[str, ...],
        Field(description="inner tensors that are compared with the teacher's of the same name"),
    ] = ()
    distill_tensors_weight: Annotated[
        float, Field(ge=0, description="weight of each inner tensor's relative squared error")
    ] = 1.0
    l1: Annotated[
        float, Field(ge=0, description="adds l1 times the sum of the weights' magnitudes")
    ] = 0.0
    l2: Annotated[
        float, Field(ge=0, description="adds l2 / 2 times the sum of the weights' squares")
    ] = 0.0


_OF_SGD = ("nesterov", "momentum")


@training_options
class Update:
    """How a gradient changes a weight."""

    optimizer: Annotated[
        Literal["sgd", "adam", "adamw"], Field(description="sgd, adam or adamw")
    ] = "adam"
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd")] = 0.9
    nesterov: Annotated[bool, Field(description="sgd looks ahead along its momentum")] = False
    beta1: Annotated[float, Field(ge=0, lt=1, description="decay of adam's mean gradient")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="decay of adam's mean square")] = 0.999
    epsilon: Annotated[float, Field(gt=0, description="added to adam's denominator")] = 1e-8
    relative_steps: Annotated[
        bool,
        Field(
            description="the learning rate of each weight is in proportion to its root mean square "
            "(Shazeer and Stern 2018, section 8), so that one rate suits folded networks, too"
        ),
    ] = False
    weight_decay: Annotated[
        float,
        Field(
            ge=0,
            description="each step takes learning rate * weight_decay off the weights, apart from "
            "the gradient (sgd, adamw)",
        ),
    ] = 0.0
    clip_norm: Annotated[
        float | None,
        Field(gt=0, description="gradients are shortened to this norm over all weights"),
    ] = None
    accumulation: Annotated[
        int, Field(ge=1, description="batches whose gradients are averaged before the weights move")
    ] = 1

    @model_validator(mode="after")
    def _sensible(self) -> "Update":
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError("decay apart from the gradient is adamw; use optimizer=adamw, or l2")
        foreign = ("beta1", "beta2", "epsilon") if self.optimizer == "sgd" else _OF_SGD
        if (unread := first_changed(Update, self, foreign)) is not None:
            raise ValueError(f"{unread} is not for {self.optimizer}, which does not read it")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


@training_options
class Parameters:
    """Which weights move, and what the training copy of the model is like."""

    include: Annotated[
        tuple[str, ...],
        Field(description="names or patterns of weights or nodes to train; none means all"),
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Field(description="names or patterns of weights or nodes to leave alone")
    ] = ()
    freeze_unsupported: Annotated[
        bool,
        Field(description="operators without a gradient end the way back, instead of an error"),
    ] = False
    batch_norm: Annotated[
        Literal["frozen", "batch"],
        Field(
            description="BatchNormalization keeps its statistics, or takes the batch's and moves "
            "them along"
        ),
    ] = "frozen"
    regrow_steps: Annotated[
        int,
        Field(
            ge=0,
            description="steps after which it is decided again what is zero, by weights that keep "
            "moving behind the zeros (Guo et al. 2016); 0 keeps the zeros",
        ),
    ] = 0
    reassign_steps: Annotated[
        int,
        Field(
            ge=0,
            description="steps after which weights join the nearest shared value again; 0 keeps "
            "them where they are",
        ),
    ] = 0
    dropout: Annotated[
        bool,
        Field(
            description="Dropout nodes drop while training, less in front of pruned layers "
            "(Han et al. 2015, section 3.2)"
        ),
    ] = True


@training_options
class Course:
    """The course of a run."""

    epochs: Annotated[int, Field(ge=0, description="times that all samples are seen")] = 10
    batch_size: Annotated[
        int | None,
        Field(ge=1, description="samples a step; by default 32, or all if there are fewer"),
    ] = None
    learning_rate: Annotated[float, Field(gt=0, description="at its highest")] = 1e-3
    schedule: Annotated[
        Literal["constant", "cosine", "step"],
        Field(description="cosine falls to 0 at the end; step falls by decay_factor"),
    ] = "cosine"
    warmup: Annotated[
        float,
        Field(ge=0, lt=1, description="share of the steps in which the learning rate rises"),
    ] = 0.0
    decay_epochs: Annotated[int, Field(ge=1, description="epochs between falls of step")] = 5
    decay_factor: Annotated[
        float, Field(gt=0, le=1, description="what step multiplies the learning rate by")
    ] = 0.1
    validation_split: Annotated[
        float,
        Field(ge=0, lt=1, description="share of the samples that is kept out to choose by"),
    ] = 0.1
    patience: Annotated[
        int | None,
        Field(ge=1, description="epochs without a better validation before the run ends"),
    ] = None

    @model_validator(mode="after")
    def _read(self) -> "Course":
        unread = first_changed(Course, self, ("decay_epochs", "decay_factor"))
        if self.schedule != "step" and unread is not None:
            raise ValueError(f"{unread} is for schedule=step, not for {self.schedule}")
        return self
