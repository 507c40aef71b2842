"""Functions of the user's own: `file.py:function`, for data and for metrics.

The file runs with its folder at the front of `sys.path`, as if it had been started as a script,
while it is loaded and while its functions run.
"""

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from onnxslim_passes.errors import OnnxSlimError, nearest


def is_function_spec(spec: str) -> bool:
    """Whether the text has the form `file.py:function`."""
    file, colon, _ = spec.rpartition(":")
    return bool(colon) and file.endswith(".py")


class UserFunction:
    """A function in a Python file.

    Attributes:
        spec: "file.py:function", as the user wrote it.
        path: The file.
        takes: Which of the `optional` arguments it has.
    """

    def __init__(
        self,
        spec: str,
        error: type[OnnxSlimError],
        *,
        arguments: int = 0,
        optional: Sequence[str] = (),
    ) -> None:
        """Loads the file.

        Args:
            spec: "file.py:function".
            error: What to raise when the file or the function cannot be had, or fails.
            arguments: With how many arguments it will be called.
            optional: Names of further arguments that it gets if it has them.
        """
        file, _, name = spec.rpartition(":")
        self.spec = spec
        self.path = Path(file).resolve()
        self._error = error
        if not self.path.is_file():
            raise error(f"{spec}: there is no file {file!r}.")
        with self.guarded(f"loading {file!r}"):
            module = _load(self.path)
        self._function: Callable[..., Any] = self._find(module, name)
        self.takes = self._checked(arguments, optional)

    def _find(self, module: ModuleType, name: str) -> Callable[..., Any]:
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        function: Any = getattr(module, name, None) if name else None
        if not callable(function):
            hint = nearest(name, functions)
            raise self._error(f"{self.spec}: {self.path.name} has no function {name!r}.{hint}")
        found: Callable[..., Any] = function
        return found

    def _checked(self, arguments: int, optional: Sequence[str]) -> frozenset[str]:
        """Those of the optional arguments that the function has; it must take the others."""
        try:
            signature = inspect.signature(self._function)
        except ValueError:
            return frozenset()  # a builtin without a signature: the call will tell
        takes = frozenset(optional) & signature.parameters.keys()
        try:
            signature.bind(*[None] * arguments, **dict.fromkeys(takes))
        except TypeError as mismatch:
            raise self._error(
                f"{self.spec}: called with {arguments + len(takes)} arguments, but {mismatch}."
            ) from None
        return takes

    def __call__(self, *arguments: Any, **optional: Any) -> Any:
        """Calls the function; an exception in it becomes the error given, with its line.

        Args:
            arguments: As many as were announced.
            optional: Those that it `takes` are handed on by name.
        """
        given = {name: value for name, value in optional.items() if name in self.takes}
        with self.guarded("the call"):
            return self._function(*arguments, **given)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Runs the user's code: his folder importable, his exceptions turned into the error."""
        folder = str(self.path.parent)
        sys.path.insert(0, folder)
        try:
            yield
        except OnnxSlimError:
            raise
        except Exception as failure:  # the user's code may raise anything
            raise self._error(
                f"{self.spec}: {what} failed with {type(failure).__name__}: {failure}"
                f"{self._line(failure)}"
            ) from failure
        finally:
            if folder in sys.path:
                sys.path.remove(folder)

    def _line(self, failure: Exception) -> str:
        """The innermost line of the user's own file in the traceback."""
        frames = traceback.extract_tb(failure.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(self.path)]
        return f" ({self.path.name}, line {lines[-1]})" if lines else ""


def _load(path: Path) -> ModuleType:
    """The file as a module, loaded once for each state of its text."""
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    name = f"_onnxslim_user_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not importable")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
