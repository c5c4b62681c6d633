"""Secrets by reference: a config says where one is, and holds none itself."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

PASSWORD = re.compile(r"//[^/@\s]*:[^/@\s]*@")
"""User and password in a URL."""


def _is_reference(value: str) -> str:
    if not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*|file:.+", value):
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


Secret = Annotated[str, AfterValidator(_is_reference)]
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
