"""One pass from its name and options, as text or as a table, and back."""

import enum
import json
import re
from collections.abc import Mapping
from typing import Any

import pydantic

from onnxslim_passes.errors import RecipeError, unknown_name
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.base import Pass
from onnxslim_passes.passes.overrides import NodeOverride
from onnxslim_passes.recipe.options import Option, from_bare, is_list, leaves, options_of, scalar
from onnxslim_passes.recipe.overrides import format_override, override_kind, read_overrides
from onnxslim_passes.report.wording import override_text

_BARE = re.compile(r"[\w./*?:+-]+")
_KEY = re.compile(r"\s*([A-Za-z_][\w-]*)\s*=\s*")


# ---------------- building


def find_pass(name: str) -> type[Pass]:
    """The class of a pass by its name.

    Raises:
        UnknownNameError: there is none; with the nearest name.
    """
    if name not in PASSES:
        raise unknown_name("pass", name, PASSES)
    return PASSES[name]


def build_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """A pass from its name and options; the options are checked.

    Raises:
        UnknownNameError: no such pass or option; with the nearest name.
        RecipeError: an option has a wrong type or is out of range.
    """
    kind = find_pass(name)
    known = {option.name: option for option in options_of(kind)}
    values = {}
    for key, value in options.items():
        if key not in known:
            raise unknown_name(f"option of {name}", key, known)
        values[key] = _shaped(value, known[key].annotation)
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        raise RecipeError(f"{name}: {_first_problem(error, known)}") from error


def _shaped(value: Any, annotation: Any) -> Any:
    """A value as TOML or text gives it, made fit for the option's type where that is harmless."""
    kind = override_kind(annotation)
    if kind is not None:
        return tuple(read_overrides(value, kind))
    if is_list(annotation) and isinstance(value, str | int | float):
        return None if value == "none" and type(None) in leaves(annotation) else (value,)
    if value == "none" and type(None) in leaves(annotation):
        return None
    return value


def _first_problem(error: pydantic.ValidationError, known: Mapping[str, Option]) -> str:
    problem = error.errors(include_url=False)[0]
    option = known.get(str(problem["loc"][0])) if problem["loc"] else None
    kind = override_kind(option.annotation) if option is not None else None
    if kind is not None and len(problem["loc"]) > 2:
        inner = {key.name: key for key in options_of(kind)}[str(problem["loc"][2])]
        expected = inner.expected.removesuffix(" or none")
        return f"overrides: {inner.name} is {problem['input']!r}, expected {expected}"
    if option is None or problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"option '{option.name}': {message}" if option else message
    return f"option '{option.name}' is {problem['input']!r}, expected {option.expected}"


# ---------------- one pass as text


def parse_pass(text: str) -> Pass:
    """A pass from text such as ``prune-magnitude:sparsity=0.8,include=[conv*,fc*]``.

    Raises:
        UnknownNameError: no such pass or option; with the nearest name.
        RecipeError: the text is malformed, or an option has a wrong type or is out of range.
    """
    name, _, tail = text.strip().partition(":")
    name = name.strip()
    known = {option.name: option for option in options_of(find_pass(name))}
    options: dict[str, Any] = {}
    at = 0
    while at < len(tail):
        match = _KEY.match(tail, at)
        if match is None:
            raise RecipeError(
                f"{name}: expected key=value at {tail[at:]!r} in {text!r}; "
                "for example prune-magnitude:sparsity=0.8,include=[conv*,fc*]"
            )
        key = match[1]
        if key not in known:
            raise unknown_name(f"option of {name}", key, known)
        if key in options:
            raise RecipeError(f"{name}: option '{key}' is given twice in {text!r}")
        value, at = _read_value(tail, match.end(), known[key].annotation)
        options[key] = value
        at = _after_comma(tail, at, text)
    return build_pass(name, options)


def _after_comma(text: str, at: int, whole: str) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    if at == len(text):
        return at
    if text[at] != ",":
        raise RecipeError(f"expected a comma before {text[at:]!r} in {whole!r}")
    return at + 1


def _read_value(text: str, at: int, annotation: Any) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends."""
    if not text.startswith("[", at) or not is_list(annotation):
        return _read_scalar(text, at, annotation, closing="")
    items = []
    at = _skip_spaces(text, at + 1)
    while not text.startswith("]", at):
        item, at = _read_scalar(text, at, annotation, closing="]")
        items.append(item)
        at = _skip_spaces(text, at)
        if text.startswith(",", at):
            at = _skip_spaces(text, at + 1)
        elif not text.startswith("]", at):
            raise RecipeError(f"the list in {text!r} has no closing ']'")
    return tuple(items), at + 1


def _skip_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _read_scalar(text: str, at: int, annotation: Any, *, closing: str) -> tuple[Any, int]:
    if text.startswith('"', at):
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{text[at:]!r} has no closing double quote") from error
        return value, end
    depth, end = 0, at
    while end < len(text):
        mark = text[end]
        if depth == 0 and (mark == "," or mark == closing):
            break
        depth += (mark == "[") - (mark == "]")
        if depth < 0:
            raise RecipeError(f"']' without '[' at {text[at:]!r}; put the text in double quotes")
        end += 1
    bare = text[at:end].strip()
    if not bare:
        raise RecipeError(f'a value is missing at {text[at:]!r}; empty text is written ""')
    return from_bare(bare, annotation), end


def format_pass(pass_: Pass) -> str:
    """A pass as text, with the options that differ from their defaults; `parse_pass` reads it."""
    options = ",".join(
        f"{key}={format_option(value)}" for key, value in pass_.changed_options().items()
    )
    return f"{pass_.name}:{options}" if options else pass_.name


def format_option(value: Any) -> str:
    """An option's value as recipes and command lines write it."""
    if isinstance(value, enum.Enum):
        return format_option(value.value)
    if isinstance(value, NodeOverride):
        text = format_override(value)
        return text if _BARE.fullmatch(text.replace("=", "")) else json.dumps(text)
    if isinstance(value, Mapping):  # of a manifest
        return override_text(value)
    if isinstance(value, tuple | list):
        return f"[{','.join(format_option(item) for item in value)}]"
    if isinstance(value, frozenset | set):
        return format_option(sorted(value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = _BARE.fullmatch(value) and isinstance(scalar(value), str)
        return value if plain else json.dumps(value, ensure_ascii=False)
    return repr(value)
