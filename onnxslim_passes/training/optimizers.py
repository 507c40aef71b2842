"""What an optimizer makes of a gradient, as nodes of the graph.

Letters follow the papers: g the gradient, w the weight, t the number of the step from 1. Values
agree with PyTorch's `SGD`, `Adam` and `AdamW` of the same options, whose definitions these are.

- SGD with momentum: Polyak 1964; Nesterov's form: Sutskever et al. 2013.
- Adam: Kingma and Ba 2015, arXiv:1412.6980. Decoupled decay: Loshchilov and Hutter 2019,
  arXiv:1711.05101.
- Steps relative to a weight's size: Shazeer and Stern 2018, arXiv:1804.04235, section 8.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim_passes.model import Variable
from onnxslim_passes.training.emitter import Emitter
from onnxslim_passes.training.options import Update
from onnxslim_passes.training.shapes import Tensor

__all__ = ["ACCUMULATED", "Moved", "Optimizer", "clipped", "make_optimizer"]

ACCUMULATED = "accumulated"

# Adafactor's epsilon_2.
_SMALLEST_SIZE = 1e-3
# As in torch.nn.utils.clip_grad_norm_.
_CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class Moved:
    """A weight after a step.

    Attributes:
        value: the weight.
        slots: the optimizer's tensors that go with it, by name.
    """

    value: Variable
    slots: dict[str, Variable]


class Optimizer(abc.ABC):
    """An optimizer in one graph.

    Args:
        emit: the graph.
        options: which one.
        rate: learning rate, float32, rank 0.
        count: number of the optimizer step, int64, rank 0, 0 in the first.
    """

    slots: tuple[str, ...] = ()

    def __init__(self, emit: Emitter, options: Update, rate: Tensor, count: Tensor) -> None:
        self.emit, self.options, self.rate, self.count = emit, options, rate, count

    def move(
        self, value: Tensor, gradient: Tensor, slots: Mapping[str, Tensor], *, decays: bool
    ) -> Moved:
        """One step of one weight; all tensors float32 of one shape."""
        size = self._size(value) if self.options.relative_steps else None
        if decays and self.options.weight_decay:
            emit = self.emit
            shrunk = emit.scale(self.rate, self.options.weight_decay)
            value = emit.sub(value, emit.mul(value, shrunk))
        direction, slots = self._step(gradient, slots)
        if size is not None:
            direction = self.emit.mul(direction, size)
        return Moved(self.emit.sub(value, direction), slots)

    def _size(self, value: Tensor) -> Variable:
        """The root mean square of a weight, not below a floor that lets zeros move."""
        emit = self.emit
        root = emit.op("Sqrt", emit.reduce_mean(emit.square(value)))
        return emit.op("Max", root, emit.scalar(_SMALLEST_SIZE, root))

    @abc.abstractmethod
    def _step(
        self, gradient: Tensor, slots: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Variable]]:
        """What is subtracted from a weight, and the slots after."""


class Sgd(Optimizer):
    """``b = momentum b + g``; ``w -= rate b``, or ``w -= rate (g + momentum b)``."""

    def __init__(self, emit: Emitter, options: Update, rate: Tensor, count: Tensor) -> None:
        super().__init__(emit, options, rate, count)
        self.slots = ("momentum",) if options.momentum else ()

    def _step(
        self, gradient: Tensor, slots: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Variable]]:
        emit, momentum = self.emit, self.options.momentum
        if not momentum:
            return emit.mul(gradient, self.rate), {}
        buffer = emit.add(emit.scale(slots["momentum"], momentum), gradient)
        direction = buffer
        if self.options.nesterov:
            direction = emit.add(gradient, emit.scale(buffer, momentum))
        return emit.mul(direction, self.rate), {"momentum": buffer}


class Adam(Optimizer):
    """``m``, ``v`` the decayed means of g and g^2; ``w -= rate m' / (sqrt(v') + epsilon)``.

    ``m' = m / (1 - beta1^t)`` and ``v' = v / (1 - beta2^t)`` correct the bias of the start.
    """

    slots = ("first_moment", "second_moment")

    def __init__(self, emit: Emitter, options: Update, rate: Tensor, count: Tensor) -> None:
        super().__init__(emit, options, rate, count)
        # In double precision: 1 - 0.999^1 has four digits left in float32.
        t = emit.add(emit.cast(count, np.float64), emit.constant(np.array(1.0)))
        bias1, bias2 = self._correction(t, options.beta1), self._correction(t, options.beta2)
        self._step_size = emit.div(rate, emit.cast(bias1, np.float32))
        self._root = emit.cast(emit.op("Sqrt", bias2), np.float32)

    def _correction(self, t: Tensor, beta: float) -> Variable:
        power = self.emit.op("Pow", self.emit.constant(np.array(beta)), t)
        return self.emit.sub(self.emit.constant(np.array(1.0)), power)

    def _step(
        self, gradient: Tensor, slots: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Variable]]:
        emit, options = self.emit, self.options
        m = self._average(slots["first_moment"], gradient, options.beta1)
        v = self._average(slots["second_moment"], emit.square(gradient), options.beta2)
        root = emit.div(emit.op("Sqrt", v), self._root)
        denominator = emit.add(root, emit.scalar(options.epsilon, root))
        step = emit.div(emit.mul(m, self._step_size), denominator)
        return step, {"first_moment": m, "second_moment": v}

    def _average(self, old: Tensor, new: Tensor, beta: float) -> Variable:
        return self.emit.add(self.emit.scale(old, beta), self.emit.scale(new, 1 - beta))


_OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": Sgd, "adam": Adam, "adamw": Adam}


def make_optimizer(emit: Emitter, options: Update, rate: Tensor, count: Tensor) -> Optimizer:
    """The optimizer that the options name."""
    return _OPTIMIZERS[options.optimizer](emit, options, rate, count)


def clipped(emit: Emitter, gradients: Sequence[Tensor], norm: float) -> list[Variable]:
    """Gradients times ``min(1, norm / ||all of them||_2)`` (Pascanu et al. 2013, section 3.2)."""
    squares = [emit.reduce("ReduceSumSquare", gradient) for gradient in gradients]
    whole = emit.op("Sqrt", emit.op("Sum", *squares) if len(squares) > 1 else squares[0])
    length = emit.add(whole, emit.scalar(_CLIP_EPSILON, whole))
    factor = emit.op("Min", emit.div(emit.scalar(norm, whole), length), emit.scalar(1.0, whole))
    return [emit.mul(gradient, factor) for gradient in gradients]
