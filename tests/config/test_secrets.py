"""No config holds a secret, and an error about one does not show it."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vila_ops.artifacts.kinds import Endpoint
from vila_ops.cli.messages import message_of
from vila_ops.config import Resources
from vila_ops.config.base import Config
from vila_ops.config.benchmarks import Judge
from vila_ops.config.local import LocalServers
from vila_ops.config.secrets import read_secret

JUDGE = {"model": "m", "temperature": 0, "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Resources, {"launch": "inline", "tracking": {"uri": "postgresql://vila:canary@db/mlflow"}}),
        (Resources, {"launch": "inline", "tracking": {"uri": "postgresql+psycopg://vila:can/canary@db/mlflow"}}),
        (Resources, {"launch": "inline", "tracking": {"uri": "postgresql://db/mlflow?user=vila&password=canary"}}),
        (Resources, {"launch": "inline", "tracking": {"uri": "http://vila:canary@mlflow:5000"}}),
        (Judge, {**JUDGE, "url": "http://vila:canary@judge/v1"}),
        (Endpoint, {"url": "http://vila:canary@models/v1", "name": "m"}),
    ],
)
def test_a_url_with_a_password_is_refused_and_not_shown(kind: type[Config], settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="a password in a URL would be kept") as raised:
        kind.model_validate(settings)
    for text in (str(raised.value), repr(raised.value), message_of(raised.value)):
        assert "canary" not in text
    assert "MLFLOW_TRACKING_PASSWORD" in message_of(raised.value)


def test_an_error_shows_neither_a_value_nor_the_user_of_a_url() -> None:
    for secret in ("canary", 271828182845):
        with pytest.raises(ValidationError, match="a secret is given as env:NAME or file:PATH") as raised:
            LocalServers.model_validate({"password": secret})
        assert str(secret) not in str(raised.value) + message_of(raised.value)
    with pytest.raises(ValidationError) as raised:
        Resources.model_validate({"launch": "inline", "tracking": "http://vila:canary@mlflow:5000"})
    assert "canary" not in str(raised.value) + message_of(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://vila:canary@mlflow:5000 is away", "http://mlflow:5000 is away"),
        ("postgresql://vila:can/canary@db/x: no", "postgresql://db/x: no"),
        ("postgresql+asyncpg://vila:canary?@db/x, http://vila@mlflow", "postgresql+asyncpg://db/x, http://mlflow"),
        ("'postgresql://db/x?user=u&password=canary&a=b'", "'postgresql://db/x?user=u&password=...&a=b'"),
        ("http://mlflow:5000/a@b and a:b@c", "http://mlflow:5000/a@b and a:b@c"),
        ("postgresql://db:5432/x", "postgresql://db:5432/x"),
    ],
)
def test_a_text_is_shown_without_the_logins_of_its_urls(text: str, shown: str) -> None:
    assert message_of(OSError(text)) == shown


@pytest.mark.parametrize(
    "uri",
    [
        *("http://127.0.0.1:5000", "http://mlflow:5000/a@b:c@d?x=password", "http://vila@mlflow:5000", "databricks"),
        *("sqlite:////a/b:c@d/mlflow.db", "postgresql://db:5432/mlflow", "postgresql://vila@db:5432/mlflow"),
    ],
)
def test_a_url_without_a_password_is_taken(uri: str) -> None:
    assert Resources.model_validate({"launch": "inline", "tracking": {"uri": uri}}).tracking.uri == uri


def test_a_secret_is_read_from_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("from a file\n")
    monkeypatch.setenv("VILA_CANARY", "from the environment")
    assert read_secret("env:VILA_CANARY", setting="password") == "from the environment"
    assert read_secret(f"file:{tmp_path}/secret", setting="password") == "from a file"
    (tmp_path / "secret").write_text("\n")
    with pytest.raises(ValueError, match=r"password is file:.*, but .*secret is empty"):
        read_secret(f"file:{tmp_path}/secret", setting="password")
