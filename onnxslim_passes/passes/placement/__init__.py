"""Where integers pay: sites, the choice among them, Q/DQ pairs, and what the runtime fuses."""

from onnxslim_passes.passes.placement.choice import choose, estimate
from onnxslim_passes.passes.placement.insertion import Inserted, Ranges, Scheme, insert_pairs
from onnxslim_passes.passes.placement.islands import border_decisions, unfused_sites
from onnxslim_passes.passes.placement.operators import CPU, Costs
from onnxslim_passes.passes.placement.saturation import without_flat_ends
from onnxslim_passes.passes.placement.sites import Site, Survey, survey

__all__ = [
    "CPU",
    "Costs",
    "Inserted",
    "Ranges",
    "Scheme",
    "Site",
    "Survey",
    "border_decisions",
    "choose",
    "estimate",
    "insert_pairs",
    "survey",
    "unfused_sites",
    "without_flat_ends",
]
