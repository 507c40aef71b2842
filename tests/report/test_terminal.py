import io
import json
import math

import pytest
from rich.console import Console

from onnxslim_passes.report import terminal
from onnxslim_passes.report.records import Decision, PassRecord, Report


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


def report(**changes):
    figures = {
        "file_bytes": 10_900_000,
        "zstd_bytes": None,
        "parameters": 2_700_000,
        "nonzero_parameters": 2_700_000,
        "macs": None,
    }
    decisions = [
        Decision(where="conv1.weight", taken=True, reason="half of it is zero"),
        Decision(where="conv1.bias", taken=False, reason="a bias is never pruned"),
        Decision(where="conv2.bias", taken=False, reason="a bias is never pruned"),
        Decision(where="w[0]", taken=False, reason="too small: 12 elements"),
    ]
    record = PassRecord(
        name="prune-magnitude",
        options={"sparsity": 0.8},
        changed=True,
        seconds=0.25,
        before_bytes=10_900_000,
        after_bytes=2_900_000,
        decisions=tuple(decisions),
    )
    output = {
        "name": "scores",
        "sqnr_db": 19.84,
        "cosine": 0.995,
        "max_error": 0.25,
        "agreement": None,
    }
    known = {
        "source": "model.onnx",
        "source_sha256": "0" * 64,
        "versions": {},
        "seed": 0,
        "target": "cpu",
        "samples": "64 feeds of calib.npz",
        "passes": (record,),
        "fidelity": {"sqnr_db": 19.84, "cosine": 0.995, "max_error": 0.25, "outputs": [output]},
        "before": figures,
        "after": {**figures, "file_bytes": 2_900_000, "nonzero_parameters": 540_000},
        "latency": {"reference_s": 0.0135, "candidate_s": 0.01, "speedup": 1.35},
    }
    return Report(**{**known, **changes})


def shown(view, width=80):
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(view)
    return console.file.getvalue()


def test_the_headline_says_sizes_speed_and_fidelity():
    assert terminal.headline(report(), "small.onnx") == (
        "model.onnx 10.9 MB -> small.onnx 2.90 MB (3.8x), 1.35x faster, 19.8 dB SQNR"
    )


@pytest.mark.parametrize(
    ("speedup", "words"),
    [
        (1.35, "1.35x faster"),
        (0.7, "SLOWER than the original: 0.70x of its speed"),
        (1.01, "same speed"),
        (0.97, "same speed"),
    ],
)
def test_slower_is_called_slower(speedup, words):
    assert terminal.speed_text(speedup) == words


def test_the_headline_leaves_out_what_was_not_measured():
    bare = report(latency={}, fidelity={})
    assert terminal.headline(bare, "o.onnx") == "model.onnx 10.9 MB -> o.onnx 2.90 MB (3.8x)"
    same = report(latency={}, fidelity={"sqnr_db": math.inf})
    assert terminal.headline(same, "o.onnx").endswith(", identical outputs")


def test_the_headline_gives_no_speed_for_a_target_that_was_not_run():
    text = terminal.headline(report(target="tensorrt"), "o.onnx")
    assert ", not run on tensorrt, " in text
    assert "faster" not in text


def test_the_headline_says_if_the_inputs_were_made_up():
    text = terminal.headline(report(samples="8 feeds of random inputs"), "o.onnx")
    assert text.endswith(", 19.8 dB SQNR on random inputs")


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


def test_reasons_beyond_the_first_few_are_counted():
    decisions = [Decision(where=name, taken=False, reason=name) for name in "abcdefg"]
    rows = terminal.reason_rows(decisions, shown=4)
    assert len(rows) == 5
    assert rows[-1] == (3, "for other reasons")


def test_reasons_that_differ_in_numbers_only_count_as_one():
    decisions = [
        Decision(where=f"w{n}", taken=False, reason=f"{n} values, 0.{n}% zeros") for n in range(3)
    ]
    assert terminal.reason_rows(decisions) == [(3, "such as w0: 0 values, 0.0% zeros")]


def test_outputs_that_are_classes_have_an_agreement_and_no_noise():
    classes = {"name": "label", "agreement": 0.875}
    classes |= dict.fromkeys(("sqnr_db", "cosine", "max_error"), math.nan)
    text = shown(terminal.fidelity_table([classes]))
    assert text.splitlines()[-1].split() == ["label", "87.50%"]
