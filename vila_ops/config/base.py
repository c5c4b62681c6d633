"""The base of every config: frozen, closed, and identified by its content."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""A name that is fit for a file or a folder."""


class Config(BaseModel):
    """A frozen value. An unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True, hide_input_in_errors=True
    )
    # defer_build: a command validates few of the 120 classes, and builds the schemas of those alone.
    # hide_input_in_errors: Prefect logs an error's text, and a value may hold a password where none belongs.

    def __hash__(self) -> int:
        """Hash of the value; works for mappings too."""
        return hash(self.model_dump_json())

    def with_changes(self, changes: Mapping[str, Any]) -> Self:
        """A validated copy with some settings changed, each given by its dotted path, such as `train.num_workers`."""
        values = self.model_dump()
        for path, value in changes.items():
            *sections, key = path.split(".")
            place = values
            for section in sections:
                place = place[section]
            place[key] = value
        return type(self).model_validate(values)

    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of all settings, defaults included."""
        return fingerprint(self.model_dump(mode="json"))


def build_schemas() -> None:
    """Build the schemas of all classes that are imported, each once: those of fields before the classes that hold them.

    At first use, pydantic builds a class with all that it holds: one that several hold is built again in each.
    """
    for one in _below(Config):
        one.model_rebuild()


def _below(base: type[Config]) -> Iterator[type[Config]]:
    """The classes derived from one in the order of their definitions, each before those derived from it."""
    for one in base.__subclasses__():
        yield one
        yield from _below(one)


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON form (sorted keys, no spaces, no NaN)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting in which two mappings differ: its dotted key and both values, None for one that is missing."""
    for key in {**one, **other}:
        ours, theirs = one.get(key), other.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from differences(ours, theirs, f"{at}{key}.")
        elif ours != theirs:
            yield f"{at}{key}", ours, theirs
