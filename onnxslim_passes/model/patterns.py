"""Names and globs by which users pick weights and nodes.

A pattern is a name or a glob (``*``, ``?``, ``[abc]``). It matches a weight by the weight's own
name or by the name of a node that takes it, plain or with the path of the body it stands in
(``If_12/then_branch/conv1``).
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from onnxslim_passes.errors import unknown_name
from onnxslim_passes.model.model import Model
from onnxslim_passes.model.weights import Weight

__all__ = ["check_patterns", "first_match", "weight_names"]


def first_match(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first pattern that matches one of the names, or None."""
    return next((p for p in patterns if any(_matches(p, name) for name in names)), None)


def weight_names(weight: Weight) -> set[str]:
    """All names that a pattern may match a weight by."""
    names = {label for node in weight.nodes for label in (node.name, node.where)}
    return (names | {weight.name, weight.where}) - {""}


def check_patterns(model: Model, options: Mapping[str, Sequence[str]]) -> None:
    """Sees that every pattern matches a node or constant of the model.

    Args:
        model: the model.
        options: patterns by the name of the option that holds them.

    Raises:
        UnknownNameError: one matches nothing; with the nearest name.
    """
    names = {label for node in model.nodes() for label in (node.name, node.where)}
    names |= {label for held in model.constants() for label in (str(held.name), held.where)}
    names.discard("")
    for option, patterns in options.items():
        for pattern in patterns:
            if not any(_matches(pattern, name) for name in names):
                raise unknown_name(f"node or weight in `{option}`:", pattern, names)


def _matches(pattern: str, name: str) -> bool:
    # A name with brackets in it is not meant as a set of characters.
    return pattern == name or fnmatch.fnmatchcase(name, pattern)
