"""Whether values from a JSON file have the types of a dataclass's fields, told in words that people know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["type_mistakes"]

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def type_mistakes(cls: type, content: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each value in `content` that the field of `cls` with its name cannot hold. All names must be fields."""
    types = get_type_hints(cls)
    for name, value in content.items():
        if not _fits(value, types[name]):
            yield f"{name} {value!r} is not possible: expected {_expected(types[name])}."


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value is of a field's type."""
    if get_origin(annotation) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    return type(value) in ((int, float) if annotation is float else (annotation,))


def _expected(annotation: Any) -> str:
    """A field's type in words."""
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_expected, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(get_args(annotation))}"
    return _WORDS[annotation]
