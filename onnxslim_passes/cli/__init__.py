"""The command line: argv -> recipe -> pipeline -> report; one file a command.

Commands are imported when they are called, so that ``--help`` answers at once.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from cyclopts import App, CycloptsError

from onnxslim_passes.errors import OnnxSlimError

__all__ = ["main"]

DEBUG_VARIABLE = "ONNXSLIM_PASSES_DEBUG"
INTERNAL_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 130, 141

_HELP = """\
Make an ONNX model smaller, and see what it cost.

Start with onnxslim-passes inspect MODEL, then try a ready recipe:

    onnxslim-passes compress model.onnx -o small.onnx --recipe codebook
"""

_EPILOGUE = """\
Exit codes: 0 done; 1 a defect of this program; 2 wrong usage or recipe; 3 the model or the data \
is invalid or not supported; 4 a guard (--max-drop, --require-speedup, --require-ratio) was not \
met. On any of these but 0 no output file is written or changed."""

_COMMANDS = {
    "inspect": "What is in a model, and what each pass could do to it.",
    "compress": "Make a model smaller: run passes, verify, measure and save.",
    "compare": "Compare two models: size, outputs, latency, task metric.",
    "unpack": "Make the stored weights of a model dense again, for other tools.",
    "explain": "Why a weight or node was, or was not, compressed.",
    "passes": "List passes and ready recipes, or one with its options.",
    "train-graph": "Write the training step of a model as ONNX files.",
    "fine-tune": "Train a model on ONNX Runtime and write the tuned values back.",
}


def _app() -> App:
    app = App(
        name="onnxslim-passes",
        help=_HELP,
        help_format="plaintext",
        help_epilogue=_EPILOGUE,
        version=version("onnxslim-passes"),
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for name, summary in _COMMANDS.items():
        module = name.replace("-", "_")
        target = f"onnxslim_passes.cli.{module}:{module}"
        app.command(target, name=name, help=summary, help_epilogue="")
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0 done; 2, 3 or 4 as `errors` has them; 1 a defect of this program; 130
        after Ctrl-C; 141 if the reader of the output went away.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _app()(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except OnnxSlimError as error:
        return _fail(error, error.exit_code)
    except CycloptsError as error:
        return _fail(error, 2, _option_problem(error))
    except BrokenPipeError:
        # The reader went away, as `head` does; the interpreter's own flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt as error:
        return _fail(error, INTERRUPTED, "interrupted; nothing was written")
    except MemoryError as error:
        return _fail(error, 3, "out of memory")
    except OSError as error:
        return _fail(error, 3, f"{error.filename}: {error.strerror}" if error.filename else None)
    except Exception as error:  # the outermost frame: a user gets a line, not a stack
        return _fail(
            error,
            INTERNAL_ERROR,
            f"{type(error).__name__}: {error} (a defect of onnxslim-passes: please report it with "
            f"this command and the model; {DEBUG_VARIABLE}=1 shows the traceback)",
        )
    return 0


def _option_problem(error: CycloptsError) -> str | None:
    """What is wrong with an option that a group of options refused, or None for other errors."""
    from pydantic import ValidationError  # only errors need it

    if not isinstance(error.__cause__, ValidationError):
        return None
    problem = error.__cause__.errors(include_url=False)[0]
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    expected = problem["msg"].removeprefix("Input should be ")
    return f"option {problem['loc'][0]!r} is {problem['input']!r}, expected {expected}"


def _fail(error: BaseException, code: int, message: str | None = None) -> int:
    """Prints one line for an error on stderr, after its traceback if asked for."""
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    text = " ".join((message or str(error) or type(error).__name__).split())
    print(f"error: {text}", file=sys.stderr)
    return code
