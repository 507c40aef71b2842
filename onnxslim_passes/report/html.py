"""A report as one HTML page: no other files, no network, readable in print and in the dark."""

from collections.abc import Iterator
from typing import Any

import jinja2

from onnxslim_passes.report.records import Report
from onnxslim_passes.report.wording import (
    bytes_text,
    db_text,
    figure_rows,
    headline,
    metric_text,
    pass_text,
    seconds_text,
    zeros_note,
)

_TEMPLATE = "report.html.jinja"


def render_html(report: Report, output: str) -> str:
    """The whole report as HTML text.

    Args:
        report: of the run.
        output: name of the file that was written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("onnxslim_passes.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(_TEMPLATE).render(
        report=report,
        headline=headline(report, output),
        metric=metric_text(report),
        figures=list(figure_rows(report)),
        steps=list(_steps(report)),
        each=any(record.fidelity for record in report.passes),
        outputs=[_output(output) for output in report.fidelity.get("outputs", ())],
        decisions=[
            {"by": name, "where": d.where, "taken": d.taken, "reason": d.reason}
            | {"figures": ", ".join(f"{key} {_plain(value)}" for key, value in d.figures.items())}
            for name, d in report.decisions()
        ],
        note=zeros_note(report),
    )


def _steps(report: Report) -> Iterator[dict[str, Any]]:
    """Bytes before the first pass and after each one; `share` of the original, for the bars."""
    if not report.passes:
        return
    original = report.passes[0].before_bytes
    largest = max(original, *(record.after_bytes for record in report.passes))
    yield {"name": "original", "bytes": bytes_text(original), "share": original / largest}
    for record in report.passes:
        yield {
            "name": pass_text(record),
            "bytes": bytes_text(record.after_bytes),
            "share": record.after_bytes / largest,
            "changed": f"{record.taken} of {len(record.decisions)}",
            "time": seconds_text(record.seconds),
            "sqnr": db_text(record.fidelity["sqnr_db"]) if record.fidelity else "",
        }


def _output(output: Any) -> dict[str, str]:
    if output["agreement"] is not None:
        error = f"{output['agreement']:.2%} of the elements are equal"
        return {"name": output["name"], "sqnr": "", "cosine": "", "max_error": error}
    return {
        "name": output["name"],
        "sqnr": db_text(output["sqnr_db"]),
        "cosine": f"{output['cosine']:.5f}",
        "max_error": f"{output['max_error']:.3g}",
    }


def _plain(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
