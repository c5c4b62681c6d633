"""The register of a model's aliases: STORE/registry/<name>, changed only by compare-and-swap, as leases are.

It is the truth about the champion; MLflow's aliases are its view. One swap changes the aliases and adds to the history,
so the history is linear whatever happens to a process between its reads and its writes.
"""

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote, unquote

from pydantic import ValidationError

from vila_ops.artifacts.kinds import ModelVersion
from vila_ops.artifacts.store import backend, manifest_of, probe, root_of
from vila_ops.errors import CorruptArtifact
from vila_ops.registry.aliases import ALIASES, CHAMPION, PREVIOUS, Alias, AliasRecord, Move, aliases_after, race_lost


def read(name: str, *, store: str) -> AliasRecord:
    """Where the aliases of a model point, and every move so far; an empty record for an unknown model."""
    return _load(place_of(name, store=store))[0]


def move(
    name: str, changes: Mapping[Alias, ModelVersion | None], *, over: int | None, reason: str, store: str
) -> AliasRecord:
    """Point some aliases to versions, or nowhere, in one step, provided that the champion is still version `over`.

    Where they point there already, nothing changes. Raises PromotionRaceLost where another process changed the
    champion, and what `probe` raises.
    """
    probe(store)
    place, token = place_of(name, store=store), secrets.token_hex(8)
    wanted = {alias: None if one is None else one.version for alias, one in changes.items()}
    new = {one.version: one.checkpoint for one in changes.values() if one is not None}
    while True:
        record, tag = _load(place)
        if any(one.token == token for one in record.history):  # stored, but the answer was lost
            return record
        if all(record.version(alias) == version for alias, version in wanted.items()):  # another process did it
            return record
        if record.version(CHAMPION) != over:
            raise race_lost(name, version=wanted.get(CHAMPION), champion=over, now=record.version(CHAMPION))
        made = Move(
            number=len(record.history) + 1,
            token=token,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            reason=reason,
            aliases=aliases_after(record.aliases(), wanted),
        )
        after = AliasRecord(checkpoints={**record.checkpoints, **new}, history=(*record.history, made))
        if backend(place).swap(place, after.model_dump_json().encode(), tag) is not None:
            return after


def go_back(name: str, *, reason: str, store: str) -> AliasRecord:
    """Make the previous champion the champion; that one becomes `previous`, so that a second call undoes the first.

    Raises ValueError without a previous champion, CorruptArtifact where its weights are gone, and what `move` raises.
    """
    record = read(name, store=store)
    previous = record.model_version(name, PREVIOUS)
    if previous is None:
        raise ValueError(f"{name!r} has no previous champion to go back to; `vila-ops champion` lists the moves")
    manifest_of(previous.checkpoint)
    return move(name, {CHAMPION: previous}, over=record.version(CHAMPION), reason=reason, store=store)


def remove(name: str, *, reason: str, store: str) -> AliasRecord:
    """Let no alias point to a version, so that the next one that passes the gate becomes champion without a rival."""
    champion = read(name, store=store).version(CHAMPION)
    return move(name, dict.fromkeys(ALIASES), over=champion, reason=reason, store=store)


def names(*, store: str) -> list[str]:
    """The models that a store has a register of."""
    place = f"{root_of(store)}/registry"
    return sorted({unquote(entry.name.partition("/")[0]) for entry in backend(place).entries(place)})


def place_of(name: str, *, store: str) -> str:
    """The place of a model's register. Any name of MLflow's becomes one folder or object below STORE/registry."""
    return f"{root_of(store)}/registry/{quote(name, safe='').replace('.', '%2E')}"


def _load(place: str) -> tuple[AliasRecord, str | None]:
    version = backend(place).load(place)
    if version is None:
        return AliasRecord(), None
    try:
        return AliasRecord.model_validate_json(version.data), version.tag
    except ValidationError as error:
        raise CorruptArtifact(
            f"{place} is not a register of aliases ({error}); restore it from a backup, or move it away, and the next "
            f"command takes over the aliases that MLflow has"
        ) from error
