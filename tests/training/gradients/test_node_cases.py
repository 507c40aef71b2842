"""Rules against finite differences, on the models that ONNX tests its operators with.

Some cases of every operator; `benchmarks/gradient_coverage.py` runs all of them and writes the page
docs/training-operators.md.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from onnxslim_passes.training.gradients import RULES
from tests.training.gradients.cases import LISTED, GradientCase, gradient_cases

MOST = 4  # cases of one operator


def chosen_cases() -> list[GradientCase]:
    by_operator = defaultdict(list)
    for case in gradient_cases():
        if case.operator in LISTED:
            by_operator[case.operator].append(case)
    return [
        case
        for cases in by_operator.values()
        for case in cases[:: max(1, -(-len(cases) // MOST))]
        if case.runs()
    ]


@pytest.mark.long
def test_gradients_are_finite_differences() -> None:
    cases = chosen_cases()
    wrong = {case.name: reason for case in cases if (reason := case.verdict())}
    assert not wrong
    assert len(cases) > 250


def test_every_rule_has_a_case_or_a_test_of_its_own() -> None:
    tested = {case.operator for case in gradient_cases()}
    own = {"DynamicQuantizeLinear", "GlobalLpPool", "QuantizeLinear", "Round", "Trilu"}
    assert RULES.keys() - tested == own
