"""Text to passes and back: `--pass name:key=value,...` and recipes as TOML files.

This is the only place where text becomes passes. One pass as text::

    pass     = name [ ":" option { "," option } ]
    option   = key "=" value
    value    = list | scalar                    # a scalar stands for a list of one
    list     = "[" [ scalar { "," scalar } ] "]"
    scalar   = JSON string in double quotes | bare text

Bare text ends at a comma or, in a list, at its closing bracket; brackets inside it must balance, so
that the pattern ``conv[12]*`` needs no quotes. Numbers, ``true``, ``false`` and ``none`` are
understood where the option's type allows them.
"""

import dataclasses
import enum
import json
import re
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pydantic
import tomli_w
from pydantic.fields import FieldInfo

from onnxslim_passes.errors import RecipeError, UsageError, unknown_name
from onnxslim_passes.passes import PASSES
from onnxslim_passes.passes.base import Pass

__all__ = [
    "Option",
    "Recipe",
    "build_pass",
    "find_pass",
    "format_option",
    "format_pass",
    "options_of",
    "parse_pass",
    "ready_recipes",
]

_BARE = re.compile(r"[\w./*?:+-]+")
_KEY = re.compile(r"\s*([A-Za-z_][\w-]*)\s*=\s*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a pass, as its dataclass field declares it.

    Attributes:
        name: the key in recipes and on the command line.
        expected: type and range in words, e.g. ``"number >= 0 and < 1"``.
        default: the value without the option.
        description: what it does, one or more sentences; "" if the field has none.
        annotation: the Python type.
    """

    name: str
    expected: str
    default: Any
    description: str
    annotation: Any


# ---------------- options of a pass, from its dataclass


def options_of(kind: type[Pass]) -> tuple[Option, ...]:
    """The options of a pass class, in order of declaration."""
    declared: Mapping[str, FieldInfo] = getattr(kind, "__pydantic_fields__", {})
    return tuple(
        Option(
            name=name,
            expected=_expected(field.annotation, field.metadata),
            default=field.get_default(call_default_factory=True, validated_data={}),
            description=" ".join((field.description or "").split()),
            annotation=field.annotation,
        )
        for name, field in declared.items()
    )


def _expected(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type with its range in words."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _expected(inner, [*metadata, *more])
    nullable = type(None) in get_args(annotation)
    if nullable:
        # None last, behind the range: "integer >= 1 or none".
        kept = [kind for kind in get_args(annotation) if kind is not type(None)]
        annotation = Union[tuple(kept)]  # noqa: UP007  # made at run time
    plain = get_origin(annotation) is not Annotated
    words = _type_words(annotation) if plain else _expected(annotation)
    ranges = " and ".join(_ranges(metadata))
    return f"{words}{' ' if ranges else ''}{ranges}{' or none' if nullable else ''}"


def _type_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(kind) for kind in arguments)
    if origin in (tuple, list, frozenset, set):
        kinds = [kind for kind in arguments if kind is not ...]
        return f"list of {_expected(kinds[0])}" if kinds else "list"
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " | ".join(str(member.value) for member in annotation)
    names = {float: "number", int: "integer", bool: "true | false", str: "text"}
    return names.get(annotation, "none" if annotation is type(None) else str(annotation))


def _ranges(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        match item:
            case annotated_types.Ge(ge=bound):
                yield f">= {bound}"
            case annotated_types.Gt(gt=bound):
                yield f"> {bound}"
            case annotated_types.Le(le=bound):
                yield f"<= {bound}"
            case annotated_types.Lt(lt=bound):
                yield f"< {bound}"
            case annotated_types.MultipleOf(multiple_of=step):
                yield f"a multiple of {step}"
            case annotated_types.MinLen(min_length=length):
                yield f"with at least {length} characters or items"
            case annotated_types.MaxLen(max_length=length):
                yield f"with at most {length} characters or items"
            case FieldInfo():
                yield from _ranges(item.metadata)


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types without containers: classes, and the values of Literals and enumerations."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _leaves(arguments[0])
    elif origin is Literal:
        yield from arguments
    elif origin is not None:
        for argument in arguments:
            if argument is not ...:
                yield from _leaves(argument)
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        yield from (member.value for member in annotation)
    else:
        yield annotation


def _is_list(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin in (Annotated, Union, types.UnionType):
        return any(_is_list(argument) for argument in get_args(annotation))
    return origin in (tuple, list, set, frozenset)


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
    if _is_list(annotation) and isinstance(value, str | int | float):
        return None if value == "none" and type(None) in _leaves(annotation) else (value,)
    if value == "none" and type(None) in _leaves(annotation):
        return None
    return value


def _first_problem(error: pydantic.ValidationError, known: Mapping[str, Option]) -> str:
    problem = error.errors(include_url=False)[0]
    option = known.get(str(problem["loc"][0])) if problem["loc"] else None
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
    if not text.startswith("[", at) or not _is_list(annotation):
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
    return _from_bare(bare, annotation), end


def _from_bare(bare: str, annotation: Any) -> Any:
    """A number, a truth value, None or text: whatever the option's type can take."""
    leaves = list(_leaves(annotation))
    if bare in leaves:
        return bare
    scalar = _scalar(bare)
    kinds = {leaf if isinstance(leaf, type) else type(leaf) for leaf in leaves}
    if float in kinds:
        kinds.add(int)
    return scalar if type(scalar) in kinds else bare


def _scalar(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


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
    if isinstance(value, tuple | list):
        return f"[{','.join(format_option(item) for item in value)}]"
    if isinstance(value, frozenset | set):
        return format_option(sorted(value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = _BARE.fullmatch(value) and isinstance(_scalar(value), str)
        return value if plain else json.dumps(value, ensure_ascii=False)
    return repr(value)


# ---------------- recipes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Passes in order, with a name and a description.

    As TOML::

        name = "mine"
        description = "Half of the weights become zero."

        [[pass]]
        name = "prune-magnitude"
        sparsity = 0.5
    """

    name: str
    description: str
    passes: tuple[Pass, ...]

    @classmethod
    def open(cls, name_or_path: str | Path) -> "Recipe":
        """A ready recipe by its name, or the TOML file at a path.

        Raises:
            UnknownNameError: neither a ready recipe nor a file; with the nearest name.
            RecipeError: the file is not a recipe.
        """
        text = str(name_or_path)
        ready = ready_recipes()
        if text in ready:
            return cls.from_toml(ready[text], where=text)
        path = Path(name_or_path)
        if path.is_file():
            try:
                return cls.from_toml(path.read_text(encoding="utf-8"), where=text)
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"{text}: cannot be read as text: {error}") from error
        if path.suffix == ".toml" or path.parent != Path():
            raise UsageError(f"{text}: no such recipe file")
        raise unknown_name("recipe", text, ready)

    @classmethod
    def from_toml(cls, text: str, *, where: str = "recipe") -> "Recipe":
        """A recipe from TOML text; `where` names it in messages.

        Raises:
            RecipeError: malformed TOML, no `[[pass]]`, or wrong options.
            UnknownNameError: unknown key, pass or option; with the nearest name.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"{where}: not a TOML file: {error}") from error
        for key in document:
            if key not in ("name", "description", "pass"):
                raise unknown_name(f"key in {where}", key, ["name", "description", "pass"])
        tables = document.get("pass")
        if not isinstance(tables, list) or not tables:
            raise RecipeError(f"{where}: a recipe needs at least one [[pass]] table with a `name`")
        passes = tuple(
            _pass_from_table(table, f"{where}, pass {number}")
            for number, table in enumerate(tables, start=1)
        )
        name = document.get("name", Path(where).stem)
        description = document.get("description", "")
        for key, value in (("name", name), ("description", description)):
            if not isinstance(value, str):
                raise RecipeError(f"{where}: `{key}` is {value!r}, expected text")
        return cls(name, description, passes)

    def with_pass(self, pass_: Pass) -> "Recipe":
        """The recipe with one more pass, or with another in the place of the one of its name.

        A new pass joins behind the last one of its stage or of an earlier stage.
        """
        same = [at for at, known in enumerate(self.passes) if known.name == pass_.name]
        if len(same) == 1:
            passes = (*self.passes[: same[0]], pass_, *self.passes[same[0] + 1 :])
        else:
            earlier = [at for at, known in enumerate(self.passes) if known.stage <= pass_.stage]
            place = earlier[-1] + 1 if earlier else 0
            passes = (*self.passes[:place], pass_, *self.passes[place:])
        return dataclasses.replace(self, passes=passes)

    def to_toml(self) -> str:
        """The recipe as TOML with the options that differ from defaults; `from_toml` reads it."""
        head = tomli_w.dumps({"name": self.name, "description": self.description})
        # tomli-w would write short tables inline; one below the other is easier to edit.
        tables = [f"[[pass]]\n{tomli_w.dumps(pass_.to_table())}" for pass_ in self.passes]
        return "\n".join([head, *tables])


def _pass_from_table(table: Any, where: str) -> Pass:
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise RecipeError(f"{where}: a [[pass]] table needs a `name`, such as 'prune-magnitude'")
    options = {key: value for key, value in table.items() if key != "name"}
    try:
        return build_pass(table["name"], options)
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from error


def ready_recipes() -> dict[str, str]:
    """The recipes that come with the package: name to TOML text, sorted by name."""
    folder = resources.files("onnxslim_passes") / "recipes"
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".toml")),
        key=lambda entry: entry.name,
    )
    return {entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8") for entry in files}
