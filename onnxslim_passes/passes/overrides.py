"""Options of a pass that differ for some nodes or weights.

A pass with such options declares a subclass of `NodeOverride` with one field for each, None by
default, and has an option ``overrides``. For each field the first override counts that matches and
gives it.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from typing import Annotated, Any

from pydantic import Field, model_validator

from onnxslim_passes.errors import unknown_name
from onnxslim_passes.model import Constant, Model, Node
from onnxslim_passes.passes.base import pass_options
from onnxslim_passes.passes.selection import first_match, weight_names

__all__ = ["NodeOverride", "check_overrides", "given", "node_names", "override_names"]


@pass_options
class NodeOverride:
    """Other options for the nodes and weights that a pattern matches.

    In recipes ``{nodes = "conv1*", bits = 4}``, on the command line ``conv1*=bits:4``.
    """

    nodes: Annotated[str, Field(min_length=1, description="name or pattern of nodes or weights")]

    @model_validator(mode="after")
    def _says_something(self) -> "NodeOverride":
        if all(getattr(self, field.name) is None for field in fields(self)[1:]):
            known = ", ".join(override_names(type(self)))
            raise ValueError(f"the override of {self.nodes!r} changes nothing; give one of {known}")
        return self


def override_names(kind: type[NodeOverride]) -> tuple[str, ...]:
    """What an override can change; the first is meant where text names none."""
    return tuple(field.name for field in fields(kind) if field.name != "nodes")


def given(overrides: Iterable[NodeOverride], names: Collection[str], key: str) -> Any:
    """What the first override that matches one of the names says of `key`; None if none does."""
    for override in overrides:
        value = getattr(override, key)
        if value is not None and first_match([override.nodes], names) is not None:
            return value
    return None


def node_names(node: Node) -> set[str]:
    """All names that a pattern may match a node by: its own, and those of its constants."""
    constants = [tensor for tensor in node.inputs if isinstance(tensor, Constant)]
    labels = {label for held in constants for label in (str(held.name), held.where)}
    return (labels | {node.name, node.where}) - {""}


def check_overrides(overrides: Sequence[NodeOverride], model: Model) -> None:
    """Sees that every override matches something.

    Raises:
        UnknownNameError: one matches nothing; with the nearest name.
    """
    if not overrides:
        return
    names = {name for node in model.nodes() for name in node_names(node)}
    names |= {name for weight in model.weights() for name in weight_names(weight)}
    for override in overrides:
        if first_match([override.nodes], names) is None:
            raise unknown_name("node or weight in `overrides`:", override.nodes, names)
