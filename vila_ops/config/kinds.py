"""Kinds that third-party packages add, by entry points that are read only when a config names a kind that is not ours.

The entry point's name is the kind; its value is a module with `Config` (the config class), `REVISION` (an integer that
is raised when the results change) and the functions of the group's protocol. Our own kinds are in one table per group:
kind -> module, imported when it is used.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Literal, get_args

from pydantic import ValidatorFunctionWrapHandler, WrapValidator

from vila_ops.config.base import Config
from vila_ops.errors import did_you_mean

Group = Literal["vila_ops.sources", "vila_ops.benchmarks", "vila_ops.projectors", "vila_ops.engines"]


def plugins(group: Group, ours: Any) -> WrapValidator:
    """Let `ours`, a config class or a union of them, take the kinds of a group's plugins too.

    Where it annotates a union, `SerializeAsAny()` belongs beside it: pydantic does not know a plugin's fields.
    """
    own_kinds = {config.model_fields["kind"].default for config in get_args(ours) or (ours,)}

    def validate(value: Any, validate_ours: ValidatorFunctionWrapHandler) -> Any:
        kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
        if not isinstance(kind, str) or kind in own_kinds:
            return validate_ours(value)
        point = _entry_point(group, kind)
        if point is None:
            raise _unknown(group, own_kinds, kind)
        config: type[Config] = point.load().Config
        return config.model_validate(value)

    return WrapValidator(validate)


def module_of(group: Group, ours: Mapping[str, str], kind: str) -> ModuleType:
    """The module of a kind: one of ours, imported now, or a plugin's. Raises ValueError for a kind of neither."""
    if kind in ours:
        return import_module(ours[kind])
    if point := _entry_point(group, kind):
        module: ModuleType = point.load()
        return module
    raise _unknown(group, ours, kind)


def provenance(group: Group, ours: Mapping[str, str], kind: str) -> dict[str, Any] | None:
    """The part of an address that names a plugin: its package, version and revision. None for a kind of ours."""
    point = None if kind in ours else _entry_point(group, kind)
    if point is None or point.dist is None:
        return None
    return {"package": point.dist.name, "version": point.dist.version, "revision": point.load().REVISION}


def _unknown(group: Group, ours: Iterable[str], kind: str) -> ValueError:
    known = sorted(ours)
    return ValueError(
        f"no {group} of kind {kind!r}: ours are {known}, and no installed package adds it{did_you_mean(kind, known)}"
    )


@lru_cache
def _entry_point(group: Group, kind: str) -> EntryPoint | None:
    return next(iter(entry_points(group=group, name=kind)), None)
