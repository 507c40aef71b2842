"""Puts decoders into a graph, and takes them out again."""

import itertools
import string
from collections.abc import Iterator

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

    def place(self, constant: Constant) -> int:
        """The index of a constant among the initializers of the graph."""
        return self._graph.initializers.index(constant)

    def store(self, constant: Constant, root: Step) -> Variable:
        """Replaces a constant of the graph by a decoder's output, which takes over its name."""
        rebuilt = Variable(constant.name)
        self._node(root, rebuilt)
        self._model.replace_uses(constant, rebuilt)
        self._graph.initializers.remove(constant)
        return rebuilt

    def restore(self, constant: Constant, rebuilt: Variable, place: int) -> None:
        """Puts a constant back at its place and removes what only its decoder used."""
        self._model.replace_uses(rebuilt, constant)
        self._graph.initializers.insert(place, constant)
        self._remove(rebuilt)

    def _emit(self, expression: Expression) -> Tensor:
        known = self._written.get(expression)
        if known is not None:
            return known
        tensor: Tensor
        if isinstance(expression, Step):
            name = self._graph.fresh_name(self._unused_name())
            tensor = Variable(name, expression.declaration(name))
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


class Replacement:
    """A weight stored in another form, which can be undone.

    Args:
        constant: the weight, a constant of the writer's graph.
        root: its new form: a decoder, or a payload that says dense or sparse.
        writer: of its graph.
    """

    def __init__(self, constant: Constant, root: Expression, writer: Writer) -> None:
        self.constant = constant
        self._root = root
        self._writer = writer
        self._payload = constant.payload
        self._place = 0
        self._rebuilt: Variable | None = None

    def apply(self) -> None:
        """Stores the weight in its new form."""
        if isinstance(self._root, Step):
            self._place = self._writer.place(self.constant)
            self._rebuilt = self._writer.store(self.constant, self._root)
        else:
            self.constant.sparse = isinstance(self._root, Payload) and self._root.sparse

    def undo(self) -> None:
        """Puts it back as it was; exactly so if the latest replacement is undone first."""
        if self._rebuilt is None:
            self.constant.payload = self._payload
        else:
            self._writer.restore(self.constant, self._rebuilt, self._place)
            self._rebuilt = None
