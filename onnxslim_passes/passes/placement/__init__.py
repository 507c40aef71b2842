"""Where integers pay: sites, the choice among them, Q/DQ pairs, and what the runtime fuses."""

from onnxslim_passes.passes.placement.by_rule import (
    BY_RULE,
    float_tensors,
    inputs_only,
    quantize_rest,
    rest_tensors,
    unplaced,
    weights_only,
)
from onnxslim_passes.passes.placement.choice import chained, choose, estimate, gains
from onnxslim_passes.passes.placement.insertion import (
    Inserted,
    insert_pairs,
    saturating_sites,
)
from onnxslim_passes.passes.placement.islands import border_decisions, unfused_sites
from onnxslim_passes.passes.placement.measuring import Labels, Measured, measured, separate_islands
from onnxslim_passes.passes.placement.operators import CPU, Costs
from onnxslim_passes.passes.placement.pairs import pairs_decision
from onnxslim_passes.passes.placement.saturation import without_flat_ends
from onnxslim_passes.passes.placement.schemes import Format, Ranges, Scheme, Schemes
from onnxslim_passes.passes.placement.sites import Site, Survey, survey
from onnxslim_passes.passes.placement.targets import (
    TARGETS,
    Target,
    find_target,
    needs_narrow_weights,
    takes_wide,
)
from onnxslim_passes.passes.placement.violations import Violation, check_target, target_decisions

__all__ = [
    "BY_RULE",
    "CPU",
    "TARGETS",
    "Costs",
    "Format",
    "Inserted",
    "Labels",
    "Measured",
    "Ranges",
    "Scheme",
    "Schemes",
    "Site",
    "Survey",
    "Target",
    "Violation",
    "border_decisions",
    "chained",
    "check_target",
    "choose",
    "estimate",
    "find_target",
    "float_tensors",
    "gains",
    "inputs_only",
    "insert_pairs",
    "measured",
    "needs_narrow_weights",
    "pairs_decision",
    "quantize_rest",
    "rest_tensors",
    "saturating_sites",
    "separate_islands",
    "survey",
    "takes_wide",
    "target_decisions",
    "unfused_sites",
    "unplaced",
    "weights_only",
    "without_flat_ends",
]
