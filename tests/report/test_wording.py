import math

import pytest

from onnxslim_passes.report import wording
from onnxslim_passes.report.records import Decision, PassRecord
from tests.report.reports import report


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
    assert wording.bytes_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (2_720_000, "2.72 M"), (22_600_000, "22.6 M")]
)
def test_counts_are_exact_below_a_thousand(count, text):
    assert wording.count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.5e-4, "350 us"), (0.0123, "12.3 ms"), (4.21, "4.2 s"), (200, "3 min 20 s")],
)
def test_durations(seconds, text):
    assert wording.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.7, "0.70x"), (1.354, "1.35x"), (3.71, "3.7x"), (39.2, "39x")]
)
def test_ratios(ratio, text):
    assert wording.times_text(ratio) == text


def test_decibels_of_identical_and_broken_outputs_are_said_in_words():
    assert wording.db_text(19.84) == "19.8 dB"
    assert wording.db_text(math.inf) == "identical"
    assert wording.db_text(-math.inf) == "not a number"
    assert wording.db_text(math.nan) == "not a number"


def test_the_headline_says_sizes_speed_and_fidelity():
    assert wording.headline(report(), "small.onnx") == (
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
    assert wording.speed_text(speedup) == words


def test_the_headline_leaves_out_what_was_not_measured():
    bare = report(latency={}, fidelity={})
    assert wording.headline(bare, "o.onnx") == "model.onnx 10.9 MB -> o.onnx 2.90 MB (3.8x)"
    same = report(latency={}, fidelity={"sqnr_db": math.inf})
    assert wording.headline(same, "o.onnx").endswith(", identical outputs")


def test_the_headline_gives_no_speed_for_a_target_that_was_not_run():
    text = wording.headline(report(target="tensorrt"), "o.onnx")
    assert ", not run on tensorrt, " in text
    assert "faster" not in text


def test_the_headline_says_if_the_inputs_were_made_up():
    text = wording.headline(report(samples="8 feeds of random inputs"), "o.onnx")
    assert text.endswith(", 19.8 dB SQNR on random inputs")


def test_reasons_beyond_the_first_few_are_counted():
    decisions = [Decision(where=name, taken=False, reason=name) for name in "abcdefg"]
    rows = wording.reason_rows(decisions, shown=4)
    assert len(rows) == 5
    assert rows[-1] == (3, "for other reasons")


def test_reasons_that_differ_in_numbers_only_count_as_one():
    decisions = [
        Decision(where=f"w{n}", taken=False, reason=f"{n} values, 0.{n}% zeros") for n in range(3)
    ]
    assert wording.reason_rows(decisions) == [(3, "such as w0: 0 values, 0.0% zeros")]


def test_overrides_are_written_as_the_command_line_takes_them():
    table = {"nodes": "head*", "activations": "uint16", "per_channel": False}
    record = PassRecord(
        name="quantize-static",
        options={"placement": "all", "overrides": [table]},
        changed=True,
        seconds=0.0,
        before_bytes=2,
        after_bytes=1,
        decisions=(),
    )
    text = "quantize-static (placement=all, overrides=[head*=activations:uint16+per_channel:false])"
    assert wording.pass_text(record) == text


def test_a_figure_of_one_side_is_shown_and_the_other_said_to_be_missing():
    base = report()
    found = report(after={**base.after, "zstd_bytes": 2_500_000})
    rows = {row[0]: row[1:] for row in wording.figure_rows(found)}
    assert rows["file after zstd -19"] == ("not measured", "2.50 MB", "")
    assert "multiply-adds" not in rows
