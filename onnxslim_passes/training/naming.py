"""Names for constants that are told apart in a training graph.

Two branches of an If may own initializers of one name. A training copy has one graph, and a state
has one tensor a name.
"""

from onnxslim_passes.model import Constant, Model

__all__ = ["constants_by_name", "with_unique_names"]


def with_unique_names(model: Model) -> Model:
    """A copy in which every constant has a name of its own; first ones keep theirs."""
    copy = model.copy()
    seen = set()
    for constant in copy.constants():
        if str(constant.name) in seen:
            constant.name = copy.fresh_name(str(constant.name))
        seen.add(str(constant.name))
    return copy


def constants_by_name(model: Model) -> dict[str, Constant]:
    """The constants of a model by the names that `with_unique_names` gives them."""
    twins = zip(with_unique_names(model).constants(), model.constants(), strict=True)
    return {str(named.name): constant for named, constant in twins}
