"""Compares this package's quantization with onnxruntime's and NNCF's, in one run.

    python -m venv peers-venv && peers-venv/bin/pip install -r benchmarks/requirements-peers.txt
    python benchmarks/quantization_peers.py --peers peers-venv/bin/python [--out DIR]
        [--models ppocr_v4_rec ...] [--variants prepared raw] [--tools onnxruntime nncf:mixed ...]

Each tool runs in a process of its own and sees the same samples. Results are kept in the folder
--out, and a second run only measures what is missing; --redo measures what was chosen again. The
table goes to the terminal and to benchmarks/results/quantization_peers.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from peers.cases import Case, all_cases
from peers.feeds import save_feeds
from peers.measure import measure
from peers.process import Cost, run
from peers.results import Row, Rows, append_row, read_rows
from peers.tables import page
from peers.tools import OWN, TOOLS, Tool, missing_recipes

import onnxslim_passes
from onnxslim_passes.errors import OnnxSlimError
from onnxslim_passes.report.provenance import versions
from onnxslim_passes.runtime import open_session

HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[1] / "shared" / "models"
PAGE = HERE / "results" / "quantization_peers.md"
VARIANTS = ("prepared", "raw")
# NNCF reports its use over the network unless it believes to run in continuous integration.
# Workers find this folder's modules, and whatever copy of the package this process uses.
PATHS = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {"NNCF_CI": "1", "PYTHONPATH": os.pathsep.join(PATHS)}


class Bench:
    """One run: a folder with models, samples and results.

    Args:
        out: the folder.
        peers: the interpreter that onnxruntime's quantizers and NNCF are installed for.
        timeout_s: of each tool, seconds on the clock.
    """

    def __init__(self, out: Path, peers: Path, timeout_s: float) -> None:
        self.out, self.peers, self.timeout_s = out.resolve(), peers, timeout_s
        self.results = self.out / "results.jsonl"
        for folder in ("results", "models", "samples", "logs"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)

    def rows(self) -> Rows:
        """What has been measured so far."""
        return read_rows(self.results)

    def samples(self, case: Case) -> Path:
        """The folder of the calibration samples; written once."""
        folder = self.out / "samples" / case.name
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=self.out) as temporary:
                save_feeds(Path(temporary) / "feeds", case.calibration())
                (Path(temporary) / "feeds").rename(folder)
        return folder

    def source(self, case: Case, variant: str) -> Path:
        """The float model.

        Raises:
            RuntimeError: It cannot be prepared.
        """
        if variant == "raw":
            return case.path
        path = self.out / "models" / f"{case.name}.prepared.onnx"
        if not path.is_file():
            worker: list[str | Path] = [self.peers, "-m", "peers.prepare_worker", case.path, path]
            cost = self._run([*worker, "symbolic"], f"{case.name}.prepare")
            if cost.failure:  # as its message advises
                cost = self._run([*worker, "plain"], f"{case.name}.prepare")
            if cost.failure:
                raise RuntimeError(f"{case.name} cannot be prepared: {cost.failure}")
        return path

    def floating(self, case: Case, variant: str) -> Row:
        """The row of the float model."""
        source = self.source(case, variant)
        with open_session(source) as session:
            score = case.score(session)
        size = source.stat().st_size / 1e6
        return Row(case.name, variant, "float", mb=size, score=score, speed=1.0)

    def row(self, case: Case, variant: str, tool: Tool) -> Row:
        """Runs a tool and measures what it wrote."""
        source, label = self.source(case, variant), f"{case.name}.{variant}.{tool.name}"
        target = self.out / "results" / f"{label.replace(':', '.')}.onnx"
        target.unlink(missing_ok=True)
        interpreter = Path(sys.executable) if tool.program == OWN else self.peers
        cost = self._run(tool.command(case, interpreter, source, self.samples(case), target), label)
        worth, failure = {}, cost.failure
        if not failure:
            try:
                worth = asdict(measure(case, source, target))
            except OnnxSlimError as error:
                failure = f"result refused: {' '.join(str(error).split())}"
        return Row(
            case.name, variant, tool.name, cost.cpu_s, cost.peak_mb, **worth, failure=failure
        )

    def _run(self, command: list[str | Path], label: str) -> Cost:
        log = self.out / "logs" / f"{label.replace(':', '.')}.txt"
        return run(command, log, timeout_s=self.timeout_s, environment=ENVIRONMENT)

    def fill(self, case: Case, variant: str, tools: list[Tool], *, redo: bool) -> Iterator[Row]:
        """Measures what is missing for a file, or all of it."""
        known = self.rows()
        if (case.name, variant, "float") not in known:
            yield self.floating(case, variant)
        for tool in tools:
            if redo or (case.name, variant, tool.name) not in known:
                yield self.row(case, variant, tool)


def chosen_tools(words: list[str], case: Case) -> list[Tool]:
    """The tools named (a program, or program:recipe); without names, those that fit."""
    absent = missing_recipes()
    ready = [tool for tool in TOOLS if tool.program != OWN or tool.recipe not in absent]
    if not words:
        return [tool for tool in ready if tool.fits(case)]
    exact = [tool for tool in ready if tool.name in words]
    return exact + [tool for tool in ready if tool.program in words and tool.fits(case)]


def peer_versions(peers: Path) -> str:
    """What is installed for the peers' interpreter."""
    code = (
        "from importlib.metadata import version\n"
        "print(*(f'{n} {version(n)}' for n in ('onnx', 'onnxruntime', 'nncf')), sep=', ')"
    )
    done = subprocess.run([peers, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peers}: install benchmarks/requirements-peers.txt for it first")
    return f"peers with {done.stdout.strip()}"


def own_versions() -> str:
    """The package, what it stands on, and the commit if it is a checkout."""
    words = [f"{name} {version}" for name, version in versions().items()]
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(onnxslim_passes.__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ", ".join(words)
    words[0] += f" (commit {done.stdout.strip()})"
    return ", ".join(words)


def in_order(rows: Rows) -> list[Row]:
    """Rows as the table has them: by model, file and tool, float first."""
    tools = ["float", *(tool.name for tool in TOOLS)]
    models = list(dict.fromkeys(row.model for row in rows.values()))
    return sorted(
        rows.values(),
        key=lambda row: (models.index(row.model), row.variant, tools.index(row.tool)),
    )


def write_page(bench: Bench, target: Path, cases: dict[str, Case]) -> str:
    """Writes the page of everything measured so far, and returns it."""
    scores = "; ".join(f"{case.name}: {case.score_name}" for case in cases.values())
    notes = [f"Scores: {scores}"]
    if absent := missing_recipes():
        notes.append(f"Not there yet: the recipes {', '.join(absent)}")
    text = page(in_order(bench.rows()), [own_versions(), peer_versions(bench.peers)], notes)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return text


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="their Python interpreter")
    parser.add_argument("--out", type=Path, default=Path("peers-out"), help="folder for everything")
    parser.add_argument("--models", nargs="+", default=[], help="default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--tools", nargs="+", default=[], help="a program or program:recipe")
    parser.add_argument("--redo", action="store_true", help="measure the chosen ones again")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each tool")
    parser.add_argument("--folder", type=Path, default=MODELS, help="models, data and tasks.py")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes."""
    options = parse_arguments()
    # Not resolved: in a virtual environment it is a link, and the link's place decides.
    peers = options.peers.absolute()
    peer_versions(peers)
    cases = all_cases(options.folder)
    known = {tool.name for tool in TOOLS} | {tool.program for tool in TOOLS}
    for word, names in [(w, cases) for w in options.models] + [(w, known) for w in options.tools]:
        if word not in names:
            raise SystemExit(f"{word!r} is none of {', '.join(sorted(names))}")
    bench = Bench(options.out, peers, options.timeout)
    for variant in options.variants:
        for case in cases.values():
            if options.models and case.name not in options.models:
                continue
            tools = chosen_tools(options.tools, case)
            for row in bench.fill(case, variant, tools, redo=options.redo):
                append_row(bench.results, row)
                print(row, file=sys.stderr, flush=True)
    print(write_page(bench, options.page, cases))


if __name__ == "__main__":
    main()
