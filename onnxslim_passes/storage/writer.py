"""Puts decoders into a graph, and takes them out again."""

import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass

from onnxslim_passes.model import Constant, Graph, Model, Node, Variable
from onnxslim_passes.storage.base import Expression, Literal, Payload, Step

Tensor = Variable | Constant


def short_names() -> Iterator[str]:
    """a, b, ... Z, aa, ab, ...: every name costs its length in the file at each of its uses."""
    rest = string.ascii_letters + string.digits
    for length in itertools.count():
        for first in string.ascii_letters:
            for tail in itertools.product(rest, repeat=length):
                yield first + "".join(tail)


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight that a decoder rebuilds.

    Attributes:
        constant: the dense constant that was replaced; it is no longer in the graph.
        place: its index among the initializers of its graph.
        rebuilt: the decoder's output, of the same name.
    """

    constant: Constant
    place: int
    rebuilt: Variable


class Writer:
    """Writes the decoders of one graph; equal expressions without payload become one tensor.

    Args:
        model: the model.
        graph: the graph, body or function of it that holds the weights.
        names: candidates for names, shared by the writers of a model.
    """

    def __init__(self, model: Model, graph: Graph, names: Iterator[str]) -> None:
        self._model = model
        self._graph = graph
        self._names = names
        self._written: dict[Expression, Tensor] = {}

    def store(self, constant: Constant, root: Step) -> Stored:
        """Replaces a constant of the graph by the decoder's output, which takes over its name."""
        rebuilt = Variable(constant.name)
        self._node(root, rebuilt)
        self._model.replace_uses(constant, rebuilt)
        place = self._graph.initializers.index(constant)
        del self._graph.initializers[place]
        return Stored(constant, place, rebuilt)

    def restore(self, stored: Stored) -> None:
        """Puts the dense constant back and removes what only its decoder used."""
        self._model.replace_uses(stored.rebuilt, stored.constant)
        self._graph.initializers.insert(stored.place, stored.constant)
        self._remove(stored.rebuilt)

    def _emit(self, expression: Expression) -> Tensor:
        known = self._written.get(expression)
        if known is not None:
            return known
        tensor: Tensor
        if isinstance(expression, Step):
            tensor = Variable(self._graph.fresh_name(self._unused_name()))
            self._node(expression, tensor)
        else:
            tensor = self._constant(expression)
        self._written[expression] = tensor
        return tensor

    def _node(self, step: Step, output: Variable) -> None:
        inputs = [self._emit(operand) for operand in step.inputs]
        attrs = {
            name: list(value) if isinstance(value, tuple) else value for name, value in step.attrs
        }
        node = self._graph.add_node(step.op, inputs, outputs=[output], attrs=attrs)
        node.name = ""  # a name is bytes, and this node is known by its output

    def _constant(self, leaf: Payload | Literal) -> Constant:
        values = leaf.make() if isinstance(leaf, Payload) else leaf.values()
        constant = self._graph.add_constant(self._unused_name(), values)
        if isinstance(leaf, Payload) and leaf.sparse:
            constant.sparse = True
        return constant

    def _unused_name(self) -> str:
        return next(name for name in self._names if name not in self._graph.names)

    def _remove(self, tensor: Tensor) -> None:
        """Removes the makers of a tensor that nobody takes, as far up as that goes."""
        pending = [tensor]
        gone: set[Tensor] = set()
        while pending:
            unused = pending.pop()
            if unused.outputs:
                continue
            gone.add(unused)
            if isinstance(unused, Constant):
                self._graph.initializers.remove(unused)
                continue
            node: Node = unused.inputs[0]
            operands = list(dict.fromkeys(node.inputs))
            self._graph.remove_node(node)
            pending.extend(operands)
        self._written = {e: made for e, made in self._written.items() if made not in gone}
