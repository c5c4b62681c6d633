"""The key with which commands of this package call a served endpoint. Light."""

import os
from datetime import UTC, datetime
from pathlib import Path

from vila_ops.config import Access
from vila_ops.serve.app.keys import Keyring

KEY_VARIABLE = "VILA_API_KEY"


def authorization() -> dict[str, str]:
    """The header with the key of the environment; nothing without one."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def check_key(access: Access) -> None:
    """Raise ValueError unless the environment has a key that an endpoint with these settings accepts for chats.

    Raises FileNotFoundError and CorruptArtifact for its file of keys.
    """
    if access.key_file is None:
        return
    key = Keyring(Path(access.key_file)).of(os.environ.get(KEY_VARIABLE, ""), now=datetime.now(UTC))
    if key is None or "chat" not in key.scopes:
        raise ValueError(
            f"{KEY_VARIABLE} holds no valid key of {access.key_file} with scope chat, which is needed to see that the "
            f"endpoint answers; make one with `vila-ops keys create {access.key_file} deploy` and export it"
        )
