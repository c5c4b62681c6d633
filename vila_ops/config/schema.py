"""What the config classes say about a place in a tree of settings: the type of its value, and the keys beside it."""

from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from vila_ops.config.base import Config


def members(annotation: Any) -> list[Any]:
    """The types of a union, without annotations."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in members(member)]
    return [annotation]


def is_config(annotation: Any) -> bool:
    """Whether a type is a config class."""
    return isinstance(annotation, type) and issubclass(annotation, Config)


def configs(annotation: Any) -> list[type[Config]]:
    """The config classes of a union."""
    return [member for member in members(annotation) if is_config(member)]


def value_types(annotation: Any, key: str) -> list[Any]:
    """The types that a value under a key of a mapping may have."""
    types = []
    for member in members(annotation):
        if get_origin(member) is dict:
            types.append(get_args(member)[1])
        elif is_config(member) and key in member.model_fields:
            types.append(member.model_fields[key].annotation)
    return types


def locate(root: type[Config], path: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """A place in pydantic's words as the keys that a file has there, and the keys that its mapping may have.

    Pydantic's path also names the kind of each union that it enters. Both lists are empty for the root itself.
    """
    keys: list[str] = []
    annotation: Any = root
    known: list[str] = []
    for part in path:
        if chosen := [one for one in configs(annotation) if kind_of(one) == part]:
            annotation = chosen[0]
            continue
        known = sorted({key for one in configs(annotation) for key in one.model_fields})
        keys.append(str(part))
        annotation = Union[tuple(_inner(annotation, part)) or (Any,)]  # noqa: UP007 a list of types
    return keys, known


def kind_of(config: type[Config]) -> str | None:
    """The `kind` of a config class; None where it has none."""
    field = config.model_fields.get("kind")
    return None if field is None or field.is_required() else str(field.default)


def places_of(root: type[Config], key: str) -> Iterator[str]:
    """The dotted places below a class where a setting of this name is; NAME stands for a key of the user's choice."""
    for name, field in root.model_fields.items():
        if name == key:
            yield name
        for member in members(field.annotation):
            is_mapping = get_origin(member) is dict
            head = f"{name}.NAME" if is_mapping else name
            for config in configs(get_args(member)[1] if is_mapping else member):
                yield from (f"{head}.{place}" for place in places_of(config, key))


def _inner(annotation: Any, part: str | int) -> list[Any]:
    """The types of a value one step below."""
    if isinstance(part, str):
        return value_types(annotation, part)
    return [get_args(member)[0] for member in members(annotation) if get_origin(member) in (tuple, list)]
