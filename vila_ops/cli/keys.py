"""`vila-ops keys`: the API keys of an endpoint, which a running one takes over at once."""

import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vila_ops.cli.options import AsJson, print_result, say

if TYPE_CHECKING:
    from vila_ops.serve.app.keys import ApiKey

keys = typer.Typer(name="keys", no_args_is_help=True, help="API keys of an endpoint, and its audit log.")
KeysFile = Annotated[Path, typer.Argument(help="File of keys, as in serve.access.key_file of the resources")]
KeyId = Annotated[str, typer.Argument(help="Id of a key, as `list` shows it")]
Most = Annotated[int | None, typer.Option(min=1, help="Limit of this key; default: none")]


@keys.command()
def create(
    file: KeysFile,
    name: Annotated[str, typer.Argument(help="Who uses the key")],
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="chat (the default) or metrics; repeatable")
    ] = None,
    days: Annotated[float | None, typer.Option("--days", min=0, help="Days until it expires; default: never")] = None,
    requests_per_minute: Most = None,
    tokens_per_minute: Most = None,
    max_concurrent: Most = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once: the file holds its hash alone."""
    from pydantic import TypeAdapter

    from vila_ops.serve.app.keys import KeyLimits, Scope, create_key

    limits = KeyLimits(
        requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, max_concurrent=max_concurrent
    )
    made = create_key(
        file,
        name,
        scopes=TypeAdapter(tuple[Scope, ...]).validate_python(tuple(scopes or ["chat"])),
        lifetime=None if days is None else timedelta(days=days),
        limits=limits,
    )
    _say_secret(*made, as_json)


@keys.command("list")
def list_keys(file: KeysFile, as_json: AsJson = False) -> None:
    """List the keys of a file, those that have ended included."""
    from vila_ops.serve.app.keys import read_keys

    entries = read_keys(file)
    if as_json:
        print_result(entries, as_json)
    else:
        for key in entries:
            say(f"{key.id}  {_state(key):22}  {','.join(key.scopes):12}  {key.name}")


@keys.command()
def revoke(file: KeysFile, key_id: KeyId, as_json: AsJson = False) -> None:
    """End a key at once."""
    from vila_ops.serve.app.keys import revoke_key

    revoked = revoke_key(file, key_id)
    if as_json:
        print_result(revoked, as_json)
    else:
        say(f"revoked {revoked.id}")


@keys.command()
def rotate(
    file: KeysFile,
    key_id: KeyId,
    grace_hours: Annotated[float, typer.Option("--grace-hours", min=0, help="How long the old key still works")] = 24,
    as_json: AsJson = False,
) -> None:
    """Make a key with the name, scopes and limits of another one, which ends after the grace; print the new one."""
    from vila_ops.serve.app.keys import rotate_key

    _say_secret(*rotate_key(file, key_id, grace=timedelta(hours=grace_hours)), as_json)


@keys.command()
def audit(
    log: Annotated[Path, typer.Argument(help="A file of serve.access.audit, or of changes of keys")],
    as_json: AsJson = False,
) -> None:
    """Check that no line of an audit log was changed, removed or put in; print their number and the last hash."""
    from vila_ops.serve.app.audit import check_log

    lines, last = check_log(log)
    say(json.dumps({"lines": lines, "last_hash": last}) if as_json else f"{lines} lines, last hash {last}")


def _say_secret(key: "ApiKey", secret: str, as_json: bool) -> None:
    say(json.dumps({"id": key.id, "name": key.name, "secret": secret}) if as_json else secret)


def _state(key: "ApiKey") -> str:
    if key.revoked:
        return f"revoked {key.revoked:%Y-%m-%d %H:%M}"
    return f"until {key.expires:%Y-%m-%d %H:%M}" if key.expires else "valid"
