"""The report as a page."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from onnxslim_passes.report.html import render_html
from onnxslim_passes.report.records import Decision, PassRecord, Report

HOSTILE = "<script>alert('x')</script>&"


class Page(HTMLParser):
    """Text, tags and addresses of a page; raises nothing, so that tests look at what is there."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


@pytest.fixture
def report() -> Report:
    decisions = (
        Decision(where="conv1.weight", taken=True, reason="pruned", figures={"sparsity": 0.5}),
        Decision(where=HOSTILE, taken=False, reason="a bias is never pruned"),
    )
    record = PassRecord(
        name="prune-magnitude",
        options={"sparsity": 0.5},
        changed=True,
        seconds=0.25,
        before_bytes=4000,
        after_bytes=1000,
        decisions=decisions,
        fidelity={"sqnr_db": 31.24},
    )
    output = {"name": "y", "sqnr_db": 30.5, "cosine": 0.9991, "max_error": 0.01, "agreement": None}
    labels = {"name": "label", "agreement": 0.75}
    return Report(
        source=f"{HOSTILE}.onnx",
        source_sha256="ab" * 32,
        versions={"onnx": "1.23.2"},
        seed=7,
        target="cpu",
        samples="4 feeds",
        passes=(record,),
        fidelity={"sqnr_db": 30.5, "outputs": [output, labels]},
        before={"file_bytes": 4000, "nonzero_parameters": 1000, "macs": 10},
        after={"file_bytes": 1000, "nonzero_parameters": 500, "macs": 10},
        latency={"reference_s": 2e-3, "candidate_s": 1e-3, "speedup": 2.0},
        metric={"name": "top1", "before": 99.0, "after": 98.5, "drop": 0.5},
        warnings=("few samples",),
    )


def test_a_page_says_what_the_report_holds(report: Report) -> None:
    page = Page(render_html(report, "small.onnx"))
    for text in (
        *("4.00 kB -> small.onnx 1.00 kB (4.0x), 2.0x faster, 30.5 dB SQNR", "top1 99 -> 98.5"),
        *("few samples", "prune-magnitude (sparsity=0.5)", "1 of 2", "31.2 dB", "0.99910"),
        *("75.00% of the elements are equal", "conv1.weight", "sparsity 0.5", "onnx 1.23.2"),
        *("a bias is never pruned", "Unstructured zeros shrink the file", "seed 7", "2.00 ms"),
    ):
        assert text in page.text, text


def test_names_of_a_model_are_text_never_markup(report: Report) -> None:
    text = render_html(report, HOSTILE)
    assert HOSTILE not in text
    assert Page(text).tags.count("script") == 1  # the filter of the decisions
    assert HOSTILE in Page(text).text


def test_a_page_needs_no_other_file(report: Report) -> None:
    assert not Page(render_html(report, "small.onnx")).links


def test_a_report_without_runs_or_passes_is_a_page(report: Report, tmp_path: Path) -> None:
    sizes = {"file_bytes": 10, "nonzero_parameters": 1}
    bare = Report(
        source="",
        source_sha256="",
        versions={},
        seed=0,
        target="cpu",
        samples="",
        passes=(),
        before=sizes,
        after=sizes,
    )
    bare.save(tmp_path / "report.html")
    assert "a model in memory" in (tmp_path / "report.html").read_text(encoding="utf-8")
