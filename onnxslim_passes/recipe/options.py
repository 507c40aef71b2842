"""The options of a pass, as its dataclass declares them, with their types in words."""

import dataclasses
import enum
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from onnxslim_passes.passes.base import Pass
from onnxslim_passes.passes.overrides import NodeOverride


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


def options_of(kind: type[Pass] | type[NodeOverride]) -> tuple[Option, ...]:
    """The options of a pass or an override, in order of declaration."""
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
    if isinstance(annotation, type) and issubclass(annotation, NodeOverride):
        keys = [
            f"{option.name} ({option.expected.removesuffix(' or none')})"
            for option in options_of(annotation)
            if option.name != "nodes"
        ]
        return f"pattern=key:value+key:value with {', '.join(keys)}"
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


def leaves(annotation: Any) -> Iterator[Any]:
    """The types without containers: classes, and the values of Literals and enumerations."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from leaves(arguments[0])
    elif origin is Literal:
        yield from arguments
    elif origin is not None:
        for argument in arguments:
            if argument is not ...:
                yield from leaves(argument)
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        yield from (member.value for member in annotation)
    else:
        yield annotation


def is_list(annotation: Any) -> bool:
    """Whether the option takes several values."""
    origin = get_origin(annotation)
    if origin in (Annotated, Union, types.UnionType):
        return any(is_list(argument) for argument in get_args(annotation))
    return origin in (tuple, list, set, frozenset)


def from_bare(bare: str, annotation: Any) -> Any:
    """A number, a truth value, None or text: whatever the option's type can take."""
    allowed = list(leaves(annotation))
    if bare in allowed:
        return bare
    value = scalar(bare)
    kinds = {leaf if isinstance(leaf, type) else type(leaf) for leaf in allowed}
    if float in kinds:
        kinds.add(int)
    return value if type(value) in kinds else bare


def scalar(text: str) -> Any:
    """A truth value, None or a number that text stands for; else the text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
