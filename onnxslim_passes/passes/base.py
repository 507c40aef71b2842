"""What a pass is: options, a stage, what it requires, and one `apply` that accounts for itself."""

import abc
import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform

import pydantic.dataclasses

from onnxslim_passes.calibration import RangeCache, Samples
from onnxslim_passes.model import Model
from onnxslim_passes.report.records import Decision

__all__ = [
    "Bar",
    "Context",
    "Decision",
    "NoProgress",
    "Pass",
    "PassResult",
    "Progress",
    "RunSettings",
    "Stage",
    "pass_options",
]

Item = TypeVar("Item")
Options = TypeVar("Options", bound=type)


class Stage(enum.IntEnum):
    """Where in a pipeline a pass may stand: values first, storage last."""

    PREPARE = 0
    PRUNE = 1
    TRANSFORM = 2
    CLUSTER = 3
    QUANTIZE = 4
    TUNE = 5
    STORE = 6


class Progress(Protocol):
    """Something that shows how far long work has come."""

    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterable[Item]:
        """The same items, shown as they are taken; if there are fewer than `total`, the last."""
        ...


class NoProgress:
    """Shows nothing."""

    def track(self, items: Iterable[Item], label: str, total: int | None = None) -> Iterable[Item]:
        """The same items."""
        return items


class Bar:
    """Steps that are shown as they are done, rather than taken from a sequence.

    Args:
        progress: what shows them.
        label: of what.
    """

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label
        self._left: Iterator[int] = iter(())

    def start(self, total: int, done: int) -> None:
        """Says how many steps there are, and how many were done before."""
        self._left = iter(self._progress.track(range(done, total), self._label, total))

    def advance(self) -> None:
        """One step more."""
        next(self._left, None)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What one run of a pipeline has beside its model and its passes.

    Attributes:
        samples: calibration data; also what the outputs are compared on. None for no data.
        training: data for passes that train, with labels where their loss needs them; they take
            `samples` without it.
        target: the runtime the result is meant for.
        seed: of everything random; the same seed gives the same bytes.
        progress: shows how far long loops have come.
        checkpoints: folder, made if need be, where passes that train leave their state after each
            epoch; the same run takes up from there what was done of it. Files are called by what
            decides the result, and none is removed. None for no such files.
        cache: where ranges of activations are kept from one run to the next, or None.
    """

    samples: Samples | None = None
    training: Samples | None = None
    target: str = "cpu"
    seed: int = 0
    progress: Progress = field(default_factory=NoProgress)
    checkpoints: Path | None = None
    cache: RangeCache | None = None


@dataclass(frozen=True, kw_only=True)
class Context(RunSettings):
    """What a pipeline lends to each of its passes: the settings of the run, and models before it.

    Samples are already checked against the model's inputs.

    Attributes:
        reference: the model as the pipeline received it; never edited.
        floating: the model as it was before the first pass of stage QUANTIZE; None until then.
            Never edited. Its tensors are called as in the quantized model.
    """

    reference: Model | None = None
    floating: Model | None = None

    @classmethod
    def of(cls, settings: RunSettings, reference: Model) -> "Context":
        """The context of a run's first pass."""
        given = {each.name: getattr(settings, each.name) for each in fields(settings)}
        return cls(**given, reference=reference)

    def checkpoint(self, fingerprint: str) -> Path | None:
        """Where the state of a training run is kept, by a hash of all that decides its result."""
        name = f"{fingerprint[:16]}.checkpoint.safetensors"
        return None if self.checkpoints is None else self.checkpoints / name


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        changed: True if and only if the model differs from before.
        decisions: one for every candidate, those passed over included.
    """

    changed: bool
    decisions: tuple[Decision, ...] = ()


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(pydantic.Field,))
def pass_options(cls: Options) -> Options:
    """Makes a pass's annotated fields its options: frozen, keyword-only, checked, none unknown."""
    config = pydantic.ConfigDict(extra="forbid", validate_default=True)
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[return-value]  # the decorator returns the class it was given


class Pass(abc.ABC):
    """One graph-level rewrite; its fields are its options, in recipes, commands and documentation.

    A subclass is decorated with `pass_options` and gives each option as
    ``Annotated[type, Field(description=..., ge=...)] = default``.

    Attributes:
        name: how recipes and commands call it; verb-object.
        stage: where it may stand in a pipeline.
        summary: one line for listings.
        references: papers or specifications, one a line.
        lossless: outputs stay the same within float rounding; the pipeline holds it to that.
        needs_samples: `apply` cannot work without calibration samples.
        needs_training: `apply` cannot work without samples to train on.
        entropy_coded: what it leaves is small only once `store-weights` codes it by frequency.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    summary: ClassVar[str]
    references: ClassVar[tuple[str, ...]] = ()
    lossless: ClassVar[bool] = False
    needs_samples: ClassVar[bool] = False
    needs_training: ClassVar[bool] = False
    entropy_coded: ClassVar[bool] = False

    def requires(self, model: Model) -> None:  # noqa: B027  # most passes work on any model
        """Raises UnsupportedModelError, naming tensors or nodes, if `apply` could not work."""

    def preview(self, model: Model) -> tuple[Decision, ...] | None:
        """What `apply` would decide, as far as that is told at once and without samples.

        None if only `apply` can tell: `inspect` then tries it on a copy, unless it needs samples.
        """
        return None

    @abc.abstractmethod
    def apply(self, model: Model, context: Context) -> PassResult:
        """Edits `model` in place and accounts for every candidate."""

    def options(self) -> dict[str, Any]:
        """The options by name, in order of declaration, as given or by default."""
        return {option.name: getattr(self, option.name) for option in fields(self)}  # type: ignore[arg-type]  # every subclass is a dataclass

    def changed_options(self) -> dict[str, Any]:
        """The options that differ from their defaults: what a recipe must state."""
        defaults = type(self)().options()
        return {key: value for key, value in self.options().items() if value != defaults[key]}

    def to_table(self) -> dict[str, Any]:
        """Name and changed options as plain values that TOML and JSON can hold.

        TOML has no null: an option that is None is the text "none", which recipes read back.
        """
        return {"name": self.name} | {k: _plain(v) for k, v in self.changed_options().items()}


def _plain(value: Any) -> Any:
    if value is None:
        return "none"
    if isinstance(value, enum.Enum):
        return value.value
    if is_dataclass(value):
        given = {known.name: getattr(value, known.name) for known in fields(value)}
        return {key: _plain(item) for key, item in given.items() if item is not None}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, frozenset | set):
        return [_plain(item) for item in sorted(value)]
    return value
