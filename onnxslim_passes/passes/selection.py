"""Which weights a pass may touch: options that passes on weights share.

Patterns are names or globs; see `onnxslim_passes.model.patterns`.
"""

from collections.abc import Collection, Iterable
from typing import Annotated

from pydantic import Field

from onnxslim_passes.errors import unknown_name
from onnxslim_passes.model import Model, Role, Weight
from onnxslim_passes.model.patterns import check_patterns, first_match, weight_names
from onnxslim_passes.numerics.arrays import check_finite
from onnxslim_passes.passes.base import Decision, pass_options

__all__ = [
    "Selection",
    "first_match",
    "matching_pattern",
    "role_refusal",
    "values_refusal",
    "weight_names",
]

_ROLE_WORDS = {
    "bias": "a bias",
    "normalization": "a normalization parameter",
    "embedding": "an embedding table",
    "recurrent": "a recurrent weight",
}


@pass_options
class Selection:
    """A mix-in: ``class MyPass(Selection, Pass)``.

    Call `check` first, so that a misspelt name is an error instead of a weight silently passed
    over, then `verdict` for each weight.
    """

    include: Annotated[
        tuple[str, ...],
        Field(description="names or patterns of weights or nodes to work on; none means all"),
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Field(description="names or patterns of weights or nodes to leave alone")
    ] = ()
    op_types: Annotated[
        tuple[str, ...],
        Field(description="operators whose weights to work on, such as Conv; none means all"),
    ] = ()
    min_elements: Annotated[int, Field(ge=1, description="smaller weights are left alone")] = 1

    def check(self, model: Model) -> None:
        """Sees that every pattern and operator occurs in the model.

        Raises:
            UnknownNameError: one matches nothing; with the nearest name.
        """
        check_patterns(model, {"include": self.include, "exclude": self.exclude})
        operators = {node.op for node in model.nodes()}
        for operator in self.op_types:
            if operator not in operators:
                raise unknown_name("operator in `op_types`:", operator, operators)

    def verdict(self, weight: Weight) -> Decision | None:
        """Why the options pass a weight over, or None if it is a candidate."""
        reason = self._objection(weight)
        return Decision(where=weight.where, taken=False, reason=reason) if reason else None

    def _objection(self, weight: Weight) -> str:
        names = weight_names(weight)
        if (pattern := first_match(self.exclude, names)) is not None:
            return f"excluded by {pattern!r}"
        if self.include and first_match(self.include, names) is None:
            return "not matched by include"
        if self.op_types and not weight.op_types & set(self.op_types):
            taken_by = ", ".join(sorted(weight.op_types)) or "no operator"
            return f"taken by {taken_by}; op_types is {', '.join(self.op_types)}"
        if weight.size < self.min_elements:
            return f"has fewer elements than min_elements={self.min_elements}"
        return ""


def role_refusal(weight: Weight, roles: Collection[Role]) -> Decision | None:
    """A refusal of a weight that does something else than `roles`, or None."""
    if weight.role in roles:
        return None
    taken_by = ", ".join(sorted(weight.op_types))
    words = _ROLE_WORDS.get(weight.role, "not the weight of a layer")
    reason = f"{words} (taken by {taken_by}): left as it is"
    return Decision(where=weight.where, taken=False, reason=reason)


def values_refusal(weight: Weight) -> Decision | None:
    """A refusal of a weight whose values must not, or cannot, be changed by number, or None."""
    if weight.constant in weight.graph.outputs:
        reason = "is an output of its graph, too"
    else:
        try:
            check_finite(weight.values, weight.name)
        except ValueError as error:
            reason = str(error)
        else:
            return None
    return Decision(where=weight.where, taken=False, reason=reason)


def matching_pattern(patterns: Iterable[str], weight: Weight) -> str | None:
    """The first of the patterns that matches a weight, or None."""
    return first_match(patterns, weight_names(weight))
