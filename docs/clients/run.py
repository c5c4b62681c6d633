"""Asks an endpoint by clients of others, and writes docs/serving.md's table of them: the end of `make interop`.

Each is installed into an environment of its own. A client that cannot be installed here is skipped with the reason. One
that fails makes the command fail, and so does a run in which none asked; the page then stays as it was. The endpoint
wants a key. The clients see none of this process's environment but the key and the settings of the package managers.
"""

import base64
import io
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as Pillow

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Model, Resources, Service
from vila_ops.model.assemble import assemble
from vila_ops.serve.app.keys import KeyLimits, create_key
from vila_ops.serve.credentials import KEY_VARIABLE
from vila_ops.serve.deploy import deploy, undeploy

HERE = Path(__file__).parent
PAGE = HERE.parent / "serving.md"
START, END = "<!-- made by docs/clients/run.py -->", "<!-- end of clients -->"
TOKENIZER = HERE.parents[1] / "tests/tiny/tokenizer"
KEYS = "keys.json"
SECONDS = 900
KEPT = ("HOME", "PATH", "PIP_", "npm_config_", "NPM_CONFIG_", "SSL_CERT_FILE", "LANG", KEY_VARIABLE)
"""Names, and beginnings of names, of the variables that clients see."""


class Skipped(Exception):
    """A client cannot be installed here."""


@dataclass(frozen=True)
class Client:
    """A client of others. `ask` installs a version of it and lets it ask, in a folder of its own."""

    name: str
    version: str
    ask: Callable[[str, list[str], Path], None]


def main() -> int:
    """Run all clients, tell how each fared, and write it into the page where none failed."""
    with tempfile.TemporaryDirectory(prefix="vila") as folder:
        root = Path(folder)
        version, service, resources = tiny(root), Service(name="clients"), resources_of(root)
        os.environ[KEY_VARIABLE] = key(root)
        url = deploy(service, version, resources).url
        try:
            outcomes = {client: outcome(client, [url, version.name, image()], root) for client in CLIENTS}
        finally:
            undeploy(service, resources)
    rows = [f"| {client.name} | {client.version} | {said} |" for client, said in outcomes.items()]
    lines = ["| client | version | outcome |", "|---|---|---|", *rows]
    print("\n".join(lines))
    if "failed" in outcomes.values() or "ok" not in outcomes.values():
        return 1
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text("\n".join([before + START, *lines, END]) + rest.partition(END)[2])
    return 0


def outcome(client: Client, arguments: list[str], root: Path) -> str:
    """Let a client ask: `ok`, `skipped` with the reason, or `failed`, whose reason is printed."""
    folder = root / client.name
    folder.mkdir()
    try:
        client.ask(client.version, arguments, folder)
    except Skipped as reason:
        return f"skipped: {reason}"
    except subprocess.SubprocessError as error:
        print(f"{client.name} failed: {error}", flush=True)
        return "failed"
    return "ok"


def resources_of(root: Path) -> Resources:
    """An endpoint of this machine that wants a key."""
    storage = {name: str(root / name) for name in ("store", "data", "cache")}
    serve = {"port": 0, "access": {"key_file": str(root / KEYS)}}
    return Resources.model_validate({"launch": "inline", "device": "cpu", "storage": storage, "serve": serve})


def key(root: Path) -> str:
    """A new key of the endpoint."""
    return create_key(root / KEYS, "clients", scopes=("chat", "metrics"), lifetime=None, limits=KeyLimits())[1]


def tiny(root: Path) -> ModelVersion:
    """A random model."""
    model = Model.model_validate(
        {
            "vision_tower": {"kind": "random", "architecture": "clip"},
            "projector": {"kind": "mlp_gelu"},
            "language_model": {"kind": "random", "tokenizer": str(TOKENIZER)},
            "image_size": 56,
            "patch_size": 14,
        }
    )
    made = assemble(model, resources_of(root))
    checkpoint = Checkpoint(uri=made.uri, digest=made.digest, parents=made.parents, stage="sft", step=0)
    return ModelVersion(name="tiny", version=1, checkpoint=checkpoint, promoted=True)


def image() -> str:
    """A data URL."""
    out = io.BytesIO()
    Pillow.linear_gradient("L").resize((40, 30)).convert("RGB").save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def environment() -> dict[str, str]:
    """What clients see of the environment."""
    return {name: value for name, value in os.environ.items() if name.startswith(KEPT)}


def called(command: list[str], root: Path) -> None:
    """Run a command. Raises subprocess.SubprocessError with the end of what it said."""
    done = subprocess.run(
        command,
        cwd=root,
        env=environment(),
        timeout=SECONDS,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise subprocess.SubprocessError(
            f"{Path(command[0]).name} ended with {done.returncode}:\n{done.stdout[-3000:]}"
        )


def installed(command: list[str], root: Path) -> None:
    """Run what installs a client. Raises Skipped."""
    try:
        called(command, root)
    except subprocess.SubprocessError as error:
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise Skipped(f"it cannot be installed: {reason}") from error


def python(package: str, root: Path) -> Path:
    """Make an environment with a package, and return its folder of commands."""
    venv.create(root / "venv", with_pip=True)
    commands = root / "venv/bin"
    installed([str(commands / "python"), "-m", "pip", "install", "--quiet", package], root)
    return commands


def litellm(version: str, arguments: list[str], root: Path) -> None:
    """litellm."""
    commands = python(f"litellm=={version}", root)
    called([str(commands / "python"), str(HERE / "litellm_client.py"), *arguments], root)


def langchain(version: str, arguments: list[str], root: Path) -> None:
    """LangChain's ChatOpenAI."""
    commands = python(f"langchain-openai=={version}", root)
    called([str(commands / "python"), str(HERE / "langchain_client.py"), *arguments], root)


def npm(version: str, arguments: list[str], root: Path) -> None:
    """The official client of npm."""
    node, manager = shutil.which("node"), shutil.which("npm")
    if node is None or manager is None:
        raise Skipped("node and npm are not installed")
    installed([manager, "install", "--loglevel", "error", "--ignore-scripts", "--no-fund", f"openai@{version}"], root)
    script = shutil.copy(HERE / "openai_client.mjs", root)
    called([node, str(script), *arguments], root)


def schemathesis(version: str, arguments: list[str], root: Path) -> None:
    """schemathesis makes requests from the OpenAPI schema; none may make the server fail."""
    commands = python(f"schemathesis=={version}", root)
    command = [str(commands / "schemathesis"), "run", f"{arguments[0]}/openapi.json", "--max-examples", "50"]
    command += ["--header", f"Authorization: Bearer {os.environ[KEY_VARIABLE]}"]
    called([*command, "--checks", "not_a_server_error,response_schema_conformance", "--generation-deterministic"], root)


CLIENTS = (
    Client("litellm", "1.110.2", litellm),
    Client("langchain-openai", "1.7.4", langchain),
    Client("openai of npm", "7.55.0", npm),
    Client("schemathesis", "4.32.5", schemathesis),
)

if __name__ == "__main__":
    sys.exit(main())
