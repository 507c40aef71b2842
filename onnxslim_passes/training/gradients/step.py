"""One node in the reverse sweep: what a gradient rule is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onnxslim_passes.errors import DifferentiationError
from onnxslim_passes.model import Node
from onnxslim_passes.training.emitter import Emitter, Tensor
from onnxslim_passes.training.shapes import Array


@dataclass(frozen=True)
class Step:
    """A node, and the gradients of the loss with respect to its outputs.

    Attributes:
        emit: where a rule adds its nodes.
        node: the node to go back through.
        dys: one gradient an output, of its shape and type; None for an output that the loss does
            not depend on. At least one is not None.
        wanted: for each input, whether its gradient is needed.
    """

    emit: Emitter
    node: Node
    dys: tuple[Tensor | None, ...]
    wanted: tuple[bool, ...]

    @property
    def x(self) -> Tensor:
        """The first input."""
        first: Tensor = self.node.inputs[0]
        return first

    @property
    def y(self) -> Tensor:
        """The first output."""
        first: Tensor = self.node.outputs[0]
        return first

    @property
    def dy(self) -> Tensor:
        """The gradient of the first output; zeros if the loss depends on other outputs only."""
        first = self.dys[0]
        return self.emit.zeros_like(self.y) if first is None else first

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All inputs; those left out are variables without a name."""
        return tuple(self.node.inputs)

    def input(self, index: int) -> Tensor | None:
        """An input, or None if it was left out."""
        inputs = self.node.inputs
        return inputs[index] if index < len(inputs) and not inputs[index].is_empty() else None

    def wants(self, index: int) -> bool:
        """Whether the gradient of an input is needed."""
        return index < len(self.wanted) and self.wanted[index]

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute, or `default`, which must be ONNX's own."""
        return self.node.attr(name, default)

    def value(self, index: int, what: str) -> Array:
        """The value of an input that must be known before the run.

        Raises:
            DifferentiationError: it is not.
        """
        tensor = self.input(index)
        value = None if tensor is None else self.emit.value(tensor)
        if value is None:
            raise self.refusal(f"{what} must be known before the run")
        return value

    def refusal(self, reason: str) -> DifferentiationError:
        """An error that says why this node, of an operator with a rule, has no gradient."""
        return DifferentiationError(f"Node {self.node.where!r} ({self.node.op}): {reason}.")


# One gradient an input, in their order; None for those that have none, and at the end left out.
Rule = Callable[[Step], Sequence[Tensor | None]]
