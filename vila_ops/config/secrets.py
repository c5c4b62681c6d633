"""Secrets by reference: a config says where one is, and holds none itself."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

_DATABASE = r"(?:postgres(?:ql)?|mysql|mssql)(?:\+\w+)?://"
"""Begin of a URL of SQLAlchemy, whose password may have a slash. A path of sqlite is no URL with a user."""
_OPTION = r"[?&](?:\w*password|passwd|pwd)="
PASSWORD = re.compile(rf"//[^/@\s]*:[^/@\s]*@|{_DATABASE}[^@\s]*:[^@\s]*@|{_OPTION}", re.IGNORECASE)
"""User and password in a URL, or the name of an option of a URL that is a password."""
_USER = re.compile(rf"({_DATABASE})[^@\s]*:[^@\s]*@|(//)[^/@\s]*@", re.IGNORECASE)
_OPTION_VALUE = re.compile(rf"({_OPTION})[^&\s'\"]*", re.IGNORECASE)


def without_logins(text: str) -> str:
    """A text without the user names and passwords of its URLs."""
    return _OPTION_VALUE.sub(r"\1...", _USER.sub(r"\1\2", text))


def _is_reference(value: object) -> object:
    """Before pydantic looks at the type, since its error would show a secret that is a number."""
    if not isinstance(value, str) or not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*|file:.+", value):
        raise ValueError("a secret is given as env:NAME or file:PATH, so that no file of settings holds it")
    return value


def _has_no_password(value: str) -> str:
    if PASSWORD.search(value):
        raise ValueError(
            "a password in a URL would be kept in pages, logs and parameters of flows; leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server of MLflow, PGPASSWORD or ~/.pgpass for "
            "PostgreSQL, or the variable of an endpoint's key"
        )
    return value


Secret = Annotated[str, BeforeValidator(_is_reference)]
"""Where a secret is, `env:NAME` or `file:PATH`; it is read when it is needed."""
Url = Annotated[str, AfterValidator(_has_no_password)]
"""A URL without a password."""


def read_secret(reference: Secret, *, setting: str) -> str:
    """The secret that a setting refers to. Raises ValueError where there is none."""
    kind, _, place = reference.partition(":")
    if kind == "env":
        secret = os.environ.get(place, "")
        lacks = f"the environment has no {place}; export it, or name another place"
    else:
        try:
            secret = Path(place).expanduser().read_text(encoding="utf-8").strip()
            lacks = f"{place} is empty"
        except OSError as error:
            secret, lacks = "", f"{place} cannot be read ({error.strerror})"
    if not secret:
        raise ValueError(f"{setting} is {reference}, but {lacks}")
    return secret
