"""ONNX's own backend models, generated from or stored in the installed onnx package."""

import functools
from collections.abc import Callable

import pytest

from .cases import BACKEND_FOLDERS, Case, folder_cases, light_cases, node_cases
from .judge import CONVERSIONS, judge_all

# Groups, not an item a model: collection of 2,000 items takes longer than judging them.
GROUPS: dict[str, Callable[[], tuple[Case, ...]]] = {
    "node": node_cases,
    "light": light_cases,
    **{kind: functools.partial(folder_cases, kind) for kind in BACKEND_FOLDERS},
}


@pytest.mark.long
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("group", GROUPS)
def test_backend_models_survive(group: str, conversion: str) -> None:
    cases = GROUPS[group]()
    tally = judge_all(cases, CONVERSIONS[conversion])
    print(f"{group}, {conversion}: {tally}")
    assert tally.judged == len(cases) > 0
    assert not tally.problems, "\n".join(tally.problems)


def test_all_backend_models_are_there() -> None:
    """The suite must not shrink unnoticed, whichever version of onnx makes the models."""
    counts = {group: len(cases()) for group, cases in GROUPS.items()}
    assert counts["node"] >= 1500
    assert sum(counts.values()) - counts["node"] >= 140
