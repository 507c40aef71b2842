"""What has happened in a run so far, and its checkpoint on disk."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from onnxslim_passes.errors import InvalidModelError, UsageError
from onnxslim_passes.training.checkpoint import read_tensors, write_tensors
from onnxslim_passes.training.parameters import Array

__all__ = ["Epoch", "Journal", "Journals"]

_KEY = "onnxslim_passes"
_BEST = "best/"


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The account of one epoch; number 0 is the state before training.

    Attributes:
        number: from 1.
        loss: mean over the samples trained on, penalties included; None before training.
        metric: likewise.
        validation_loss: mean over the validation samples; None without.
        validation_metric: likewise.
    """

    number: int
    loss: float | None = None
    metric: float | None = None
    validation_loss: float | None = None
    validation_metric: float | None = None


@dataclass(frozen=True, kw_only=True)
class Journal:
    """Where a run stands.

    Attributes:
        state: state tensors that change, by name.
        best_state: those of the best epoch that belong into a model.
        epochs: the account so far.
        best: number of the best epoch.
        steps: done in all.
        batches: done of the epoch that is not in the account yet.
        loss_sum: over its samples so far.
        metric_sum: likewise.
        samples: of it so far.
    """

    state: Mapping[str, Array]
    best_state: Mapping[str, Array]
    epochs: tuple[Epoch, ...] = ()
    best: int = 0
    steps: int = 0
    batches: int = 0
    loss_sum: float = 0.0
    metric_sum: float = 0.0
    samples: int = 0

    def after_step(self, loss: float, metric: float, count: int) -> "Journal":
        """With one more batch in the open epoch."""
        return replace(
            self,
            steps=self.steps + 1,
            batches=self.batches + 1,
            loss_sum=self.loss_sum + loss * count,
            metric_sum=self.metric_sum + metric * count,
            samples=self.samples + count,
        )

    def after_epoch(self, epoch: Epoch) -> "Journal":
        """With the open epoch closed."""
        epochs = (*self.epochs, epoch)
        return replace(self, epochs=epochs, batches=0, loss_sum=0.0, metric_sum=0.0, samples=0)


@dataclass(frozen=True)
class Journals:
    """The checkpoint of one run on disk.

    Attributes:
        path: a `.safetensors` file.
        fingerprint: of everything that decides the result: another run is not taken up.
        every: steps between checkpoints inside an epoch; None for the ends of epochs only.
    """

    path: Path
    fingerprint: str
    every: int | None = field(default=None)

    def is_due(self, steps: int) -> bool:
        """Whether a checkpoint belongs behind this step."""
        return self.every is not None and steps % self.every == 0

    def read(self) -> Journal | None:
        """The journal on disk, or None if there is none.

        Raises:
            UsageError: it is of a run with other options, data or model.
            InvalidModelError: it is damaged.
        """
        if not self.path.exists():
            return None
        tensors, texts = read_tensors(self.path)
        try:
            plain = json.loads(texts[_KEY])
            fingerprint = plain.pop("fingerprint")
            epochs = tuple(Epoch(**epoch) for epoch in plain.pop("epochs"))
            state = {n: a for n, a in tensors.items() if not n.startswith(_BEST)}
            best = {n.removeprefix(_BEST): a for n, a in tensors.items() if n not in state}
            journal = Journal(state=state, best_state=best, epochs=epochs, **plain)
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidModelError(
                f"{self.path} is no checkpoint of fine-tune ({error}); remove it."
            ) from error
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"{self.path} is the checkpoint of another run: model, data or options differ. "
                "Give the same ones to go on, or remove the file to begin anew."
            )
        return journal

    def write(self, journal: Journal) -> None:
        """Replaces the checkpoint in one step."""
        plain = asdict(replace(journal, state={}, best_state={}))
        del plain["state"], plain["best_state"]
        text = json.dumps({**plain, "fingerprint": self.fingerprint})
        best = {f"{_BEST}{name}": array for name, array in journal.best_state.items()}
        write_tensors(self.path, {**journal.state, **best}, {_KEY: text})

    def remove(self) -> None:
        """Takes the checkpoint away, when the result is written."""
        self.path.unlink(missing_ok=True)
