"""Masks that shrink while a network is trained.

Every few steps the smallest weights of the moment become zero, a few more each time, until the
final sparsity is reached; then the network settles with the masks that it has. The masks are
buffers of the training graph: nothing is built anew. With latent weights (`Masked.latent`) what was
zero may come back as long as the sparsity rises.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim_passes.numerics.ramps import Ramp, ramp
from onnxslim_passes.numerics.sparsity import Mask, global_threshold, magnitude_mask
from onnxslim_passes.training.constraints.masks import Masked
from onnxslim_passes.training.forward import state_name
from onnxslim_passes.training.parameters import Array
from onnxslim_passes.training.trainer import Trainer

__all__ = ["GradualMasks", "Targets"]


@dataclass(frozen=True)
class Targets:
    """Where the masks are to end.

    Attributes:
        together: final sparsity of all weights under one threshold; None without any.
        alone: final sparsity of weights that have one of their own, by place.
    """

    together: float | None
    alone: Mapping[str, float]


class GradualMasks:
    """Decides what is zero, step after step.

    Args:
        trainer: that trains the weights.
        held: the weights.
        targets: where they are to end; each weight is either among `alone` or goes together.
        kind: of the ramp.
        steps: until the final sparsity.
        every: steps between decisions.
    """

    def __init__(
        self,
        trainer: Trainer,
        held: Sequence[Masked],
        targets: Targets,
        *,
        kind: Ramp,
        steps: int,
        every: int,
    ) -> None:
        self._trainer = trainer
        self._held = held
        self._targets = targets
        self._kind: Ramp = kind
        self._steps = steps
        self._every = every

    def after_step(self) -> None:
        """Moves the masks on, if it is time."""
        done = self._trainer.steps
        if done > self._steps or (done % self._every and done != self._steps):
            return
        self._decide(ramp(done / self._steps, self._kind))

    def _decide(self, progress: float) -> None:
        names = [state_name(one, "value") for one in self._held]
        read = self._trainer.read(names)
        values = {one.where: read[name] for one, name in zip(self._held, names, strict=True)}
        masks = self._masks(values, progress)
        changed: dict[str, Array] = {}
        for one in self._held:
            mask = masks[one.where]
            changed[state_name(one, "mask")] = mask
            if not one.latent:
                kept = np.where(mask, values[one.where], np.float32(0))
                changed[state_name(one, "value")] = kept
        self._trainer.write(changed)

    def _masks(self, values: Mapping[str, Array], progress: float) -> dict[str, Mask]:
        alone = self._targets.alone
        masks = {
            where: magnitude_mask(array, progress * alone[where])
            for where, array in values.items()
            if where in alone
        }
        rest = {where: array for where, array in values.items() if where not in alone}
        if rest and self._targets.together is not None:
            arrays = list(rest.values())
            threshold = global_threshold(arrays, progress * self._targets.together)
            masks |= dict(zip(rest, threshold.masks(arrays), strict=True))
        return masks
