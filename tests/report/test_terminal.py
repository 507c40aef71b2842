import io
import json
import math

import pytest
from rich.console import Console

from onnxslim_passes.report import terminal


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (10_860_000, "10.9 MB"),
        (99_960_000, "100 MB"),
        (999_600, "1.00 MB"),
        (3_000_000_000, "3.00 GB"),
    ],
)
def test_bytes_have_decimal_units_and_three_digits(count, text):
    assert terminal.bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (2_720_000, "2.72 M"), (22_600_000, "22.6 M")]
)
def test_counts_are_exact_below_a_thousand(count, text):
    assert terminal.count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.5e-4, "350 us"), (0.0123, "12.3 ms"), (4.21, "4.2 s"), (200, "3 min 20 s")],
)
def test_durations(seconds, text):
    assert terminal.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.7, "0.70x"), (1.354, "1.35x"), (3.71, "3.7x"), (39.2, "39x")]
)
def test_ratios(ratio, text):
    assert terminal.times_text(ratio) == text


def test_decibels_of_identical_and_broken_outputs_are_said_in_words():
    assert terminal.db_text(19.84) == "19.8 dB"
    assert terminal.db_text(math.inf) == "identical"
    assert terminal.db_text(-math.inf) == "not a number"
    assert terminal.db_text(math.nan) == "not a number"


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


def test_names_with_brackets_are_not_taken_for_markup():
    listed = terminal.table("name", "bytes", right=["bytes"])
    listed.add_row("w[0]", "12")
    console = Console(file=io.StringIO(), width=40, markup=False)
    console.print(listed)
    assert "w[0]" in console.file.getvalue()
