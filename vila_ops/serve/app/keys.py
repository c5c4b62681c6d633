"""API keys: a file that holds their hashes, and the live view of it. Light: the command `vila-ops keys` imports it.

A key is 256 random bits, so one SHA-256 of it is as good as a slow hash. The file is replaced as a whole by a rename;
a server looks at its size and time before each request, so that a key is revoked without a restart.
"""

import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, PositiveInt, ValidationError

from vila_ops.config import Config
from vila_ops.errors import CorruptArtifact
from vila_ops.serve.app.audit import AuditLog

Scope = Literal["chat", "metrics"]
"""chat: the model list and chat completions. metrics: /metrics."""
KEY = re.compile(r"vila-([0-9a-f]{8})-[A-Za-z0-9_-]{43}", re.ASCII)


class KeyLimits(Config):
    """What one key may use; None: as much as there is."""

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    """Of prompts and answers together."""
    max_concurrent: PositiveInt | None = None
    """Answers that are under way at the same time."""


class ApiKey(KeyLimits):
    """What the file holds of a key: never the key itself."""

    id: str
    """The part of the key that may be shown."""
    name: str
    sha256: str
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def is_valid(self, now: datetime) -> bool:
        """Whether the key is neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)


class KeyFile(Config):
    """All keys of an endpoint, those that were revoked included."""

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. Raises FileNotFoundError, and CorruptArtifact for a file that is not one of keys."""
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except ValidationError as error:
        raise CorruptArtifact(
            f"{path} is not a file of API keys; restore it, or remove it and make new keys with `vila-ops keys create`"
        ) from error


def create_key(
    path: Path, name: str, *, scopes: tuple[Scope, ...], lifetime: timedelta | None, limits: KeyLimits
) -> tuple[ApiKey, str]:
    """Add a key to the file, which appears if missing. Returns its entry and the key itself, which is kept nowhere."""
    now = datetime.now(UTC)
    with _changing(path) as change:
        key, secret = _new(name, scopes, now, limits)
        key = key.with_changes({"expires": None if lifetime is None else now + lifetime})
        change(lambda keys: (*keys, key))
        _note(path, "key created", key)
    return key, secret


def revoke_key(path: Path, key_id: str) -> ApiKey:
    """End a key at once. Raises ValueError for an unknown id and a key that has ended."""
    now = datetime.now(UTC)
    with _changing(path) as change:
        revoked = _valid(read_keys(path), key_id, now).with_changes({"revoked": now})
        change(lambda keys: tuple(revoked if key.id == key_id else key for key in keys))
        _note(path, "key revoked", revoked)
    return revoked


def rotate_key(path: Path, key_id: str, *, grace: timedelta) -> tuple[ApiKey, str]:
    """Add a key like another, which ends after the grace. Raises ValueError as `revoke_key`.

    Returns the new entry and the new key. It expires as long after now as the old one did after it was made.
    """
    now = datetime.now(UTC)
    with _changing(path) as change:
        old = _valid(read_keys(path), key_id, now)
        limits = KeyLimits.model_validate(old.model_dump(include=set(KeyLimits.model_fields)))
        new, secret = _new(old.name, old.scopes, now, limits)
        new = new.with_changes({"expires": old.expires and now + (old.expires - old.created)})
        ends = min(now + grace, old.expires or now + grace)
        ending = old.with_changes({"expires": ends} if grace else {"revoked": now})
        change(lambda keys: (*(ending if key.id == key_id else key for key in keys), new))
        _note(path, f"key {key_id} rotated", new)
    return new, secret


class Keyring:
    """The keys of a file as it is now."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._keys: dict[str, ApiKey] = {}

    def of(self, presented: str, *, now: datetime) -> ApiKey | None:
        """The valid key that was presented. Raises CorruptArtifact and OSError for a file that cannot be read."""
        stat = self._path.stat()
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if stamp != self._stamp:
            self._keys = {key.id: key for key in read_keys(self._path)}
            self._stamp = stamp
        parts = KEY.fullmatch(presented)
        key = self._keys.get(parts[1]) if parts else None
        if key is None or not hmac.compare_digest(key.sha256, _sha256(presented)):
            return None
        return key if key.is_valid(now) else None


def _new(name: str, scopes: tuple[Scope, ...], now: datetime, limits: KeyLimits) -> tuple[ApiKey, str]:
    key_id = secrets.token_hex(4)
    secret = f"vila-{key_id}-{secrets.token_urlsafe(32)}"
    entry = {"id": key_id, "name": name, "sha256": _sha256(secret), "scopes": scopes, "created": now}
    return ApiKey.model_validate(entry | limits.model_dump()), secret


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _valid(keys: tuple[ApiKey, ...], key_id: str, now: datetime) -> ApiKey:
    key = next((key for key in keys if key.id == key_id), None)
    if key is None:
        raise ValueError(f"there is no key {key_id!r}; `vila-ops keys list` shows the ids")
    if not key.is_valid(now):
        raise ValueError(f"key {key_id} of {key.name!r} has already ended; make another with `vila-ops keys create`")
    return key


def _note(path: Path, event: str, key: ApiKey) -> None:
    """Note a change of the file in the audit log beside it."""
    log = AuditLog(path.with_name(f"{path.name}.audit.jsonl"))
    log.write({"event": event, "key": key.id, "name": key.name, "scopes": key.scopes, "uid": os.getuid()})
    log.close()


Change = Callable[[Callable[[tuple[ApiKey, ...]], tuple[ApiKey, ...]]], None]


@contextmanager
def _changing(path: Path) -> Iterator[Change]:
    """Hold the lock of the file; the value replaces its keys by what a function makes of them."""

    def change(function: Callable[[tuple[ApiKey, ...]], tuple[ApiKey, ...]]) -> None:
        keys = read_keys(path) if path.exists() else ()
        draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(KeyFile(keys=function(keys)).model_dump_json(indent=1))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield change
