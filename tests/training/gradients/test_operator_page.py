"""docs/training-operators.md lists the operators that the table of rules has."""

from __future__ import annotations

import re
from pathlib import Path

from onnxslim_passes.training.gradients import RULES, STOPS
from onnxslim_passes.training.gradients.restrictions import RESTRICTIONS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "training-operators.md"


def rows() -> dict[str, tuple[str, str]]:
    text = PAGE.read_text(encoding="utf8")
    found = re.findall(r"^\| (\w+) \| (rule|body) \| [^|]+ \|(.*)\|$", text, re.MULTILINE)
    return {operator: (kind, restriction.strip()) for operator, kind, restriction in found}


def test_the_page_lists_all_rules() -> None:
    assert {operator for operator, (kind, _) in rows().items() if kind == "rule"} == set(RULES)


def test_the_page_states_all_restrictions() -> None:
    stated = {operator: text for operator, (_, text) in rows().items() if text}
    assert stated == RESTRICTIONS


def test_the_page_lists_where_gradients_end() -> None:
    assert f"\n{', '.join(sorted(STOPS))}.\n" in PAGE.read_text(encoding="utf8")
