"""What compression made of weights, kept while they are trained.

Constraints are read from the model: its values, its integer weights and its manifest. A user is
not asked again.
"""

from collections.abc import Mapping

from onnxslim_passes.model import Model
from onnxslim_passes.report.records import Decision
from onnxslim_passes.training.constraints.codebooks import Codebook
from onnxslim_passes.training.constraints.grids import OnGrid
from onnxslim_passes.training.constraints.integer_reading import read_integers
from onnxslim_passes.training.constraints.integers import QuantizedWeight
from onnxslim_passes.training.constraints.masks import Masked
from onnxslim_passes.training.constraints.reading import (
    Latent,
    pruned_weights,
    read_weight,
    tied_weights,
)
from onnxslim_passes.training.lowering import Lowered
from onnxslim_passes.training.options import Parameters
from onnxslim_passes.training.parameters import Constraint, objection

__all__ = ["Codebook", "Masked", "OnGrid", "QuantizedWeight", "read_constraints"]


def read_constraints(
    model: Model, lowered: Lowered, parameters: Parameters, places: Mapping[str, str]
) -> tuple[list[Constraint], list[Decision]]:
    """The constraints of all weights that compression changed and that may be trained.

    Args:
        model: as the user gave it, but that every constant has a name of its own.
        lowered: its training copy.
        parameters: which weights move, and what is decided again on the way.
        places: where each constant stands in the user's model, by its name in `model`.

    Returns:
        One constraint for every weight that something holds, one for several that are tied, and
        a decision for every integer weight that stays as it is.
    """
    copied = {str(constant.name) for constant in lowered.model.constants()}
    pruned = pruned_weights(model)
    latent = Latent(parameters.regrow_steps, parameters.reassign_steps)
    candidates = [
        weight
        for weight in model.weights()
        if weight.name in copied and objection(weight, parameters) is None
    ]
    found_integers, decisions = read_integers(model, frozenset(copied), parameters, places)
    constraints: list[Constraint] = [*found_integers]
    for group in tied_weights(candidates):
        stand = tuple(places[weight.name] for weight in group)
        found = read_weight(group, stand, pruned=not pruned.isdisjoint(stand), latent=latent)
        if found is not None:
            constraints.append(found)
    return constraints, decisions
