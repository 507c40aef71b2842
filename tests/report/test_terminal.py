import io
import json
import math

import pytest
from rich.console import Console

from onnxslim_passes.report import terminal
from tests.report.reports import report


def test_json_holds_infinities_as_text(capsys):
    terminal.print_json({"a": math.inf, "b": [1, -math.inf], "c": (2.5, math.nan)})
    assert json.loads(capsys.readouterr().out) == {"a": "inf", "b": [1, "-inf"], "c": [2.5, "nan"]}


def test_progress_is_silent_where_stderr_is_not_a_terminal(capsys):
    with terminal.TerminalProgress() as progress:
        assert list(progress.track(range(3), "counting")) == [0, 1, 2]
        assert list(progress.track(iter("ab"), "letters", total=2)) == ["a", "b"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_bar_of_fewer_items_than_its_total_shows_the_last():
    with terminal.TerminalProgress() as progress:
        shown = iter(progress.track(range(7, 9), "training", 9))
        next(shown)
        (bar,) = progress._bars.tasks
        assert (bar.completed, bar.total) == (7, 9)
        next(shown)
        assert bar.completed == 8
        counter = progress.counter()
        counter.start(9, 7)
        counter.advance("training")
        assert [task.completed for task in progress._bars.tasks] == [8, 8]


def test_names_with_brackets_are_not_taken_for_markup():
    listed = terminal.table("name", "bytes", right=["bytes"])
    listed.add_row("w[0]", "12")
    console = Console(file=io.StringIO(), width=40, markup=False)
    console.print(listed)
    assert "w[0]" in console.file.getvalue()


def shown(view, width=80):
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(view)
    return console.file.getvalue()


def test_the_metric_stands_first_below_the_headline():
    metric = {"name": "top1", "before": 98.5, "after": 98.25, "drop": 0.25}
    text = shown(terminal.report_view(report(metric=metric)))
    assert text.splitlines()[0] == "top1 98.5 -> 98.25, drop 0.25"


@pytest.mark.parametrize("width", [80, 120])
def test_the_report_for_a_person_has_figures_passes_and_reasons(width):
    text = shown(terminal.report_view(report(warnings=("Careful.",))), width)
    assert "warning: Careful." in text
    assert "prune-magnitude (sparsity=0.8)" in text
    assert "1 of 4" in text
    assert "prune-magnitude  2  a bias is never pruned (e.g. conv1.bias)" in text
    assert "prune-magnitude  1  too small: 12 elements (w[0])" in text
    assert "unstructured zeros shrink the file, not the time" in text
    assert max(map(len, text.splitlines())) <= width


def test_outputs_that_are_classes_have_an_agreement_and_no_noise():
    classes = {"name": "label", "agreement": 0.875}
    classes |= dict.fromkeys(("sqnr_db", "cosine", "max_error"), math.nan)
    text = shown(terminal.fidelity_table([classes]))
    assert text.splitlines()[-1].split() == ["label", "87.50%"]
