"""Gradients of ONNX graphs as ONNX graphs: one rule an operator, one reverse sweep.

`rules` lists the operators; each rule is a small function that emits nodes, in the file of its
kind, whose docstring gives the algebra.
"""

from onnxslim_passes.training.gradients.reverse import (
    Gradients,
    check_differentiable,
    gradients,
)
from onnxslim_passes.training.gradients.rules import RULES, STOPS
from onnxslim_passes.training.gradients.step import Rule, Step

__all__ = [
    "RULES",
    "STOPS",
    "Gradients",
    "Rule",
    "Step",
    "check_differentiable",
    "gradients",
]
