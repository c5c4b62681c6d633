"""Asks an endpoint by clients of others: `make interop`. Each is installed into an environment of its own.

A client that cannot be installed here is skipped with the reason; one that fails makes the command fail. The clients
see none of this process's environment but the settings of the package managers.
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
from pathlib import Path

from PIL import Image as Pillow

from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.config import Model, Resources, Service
from vila_ops.model.assemble import assemble
from vila_ops.serve.deploy import deploy, undeploy

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[1] / "tests/tiny/tokenizer"
SECONDS = 900
KEPT = ("HOME", "PATH", "PIP_", "npm_config_", "NPM_CONFIG_", "SSL_CERT_FILE", "LANG")
"""Names, and beginnings of names, of the variables that clients see."""


class Skipped(Exception):
    """A client cannot be installed here."""


def main() -> int:
    """Run all clients, and tell how each fared."""
    with tempfile.TemporaryDirectory(prefix="vila") as folder:
        root = Path(folder)
        version, service, resources = tiny(root), Service(name="clients"), resources_of(root)
        url = deploy(service, version, resources).url
        try:
            outcomes = [outcome(name, run, [url, version.name, image()], root / name) for name, run in CLIENTS.items()]
        finally:
            undeploy(service, resources)
    return int(not all(outcomes))


def outcome(name: str, run: Callable[[list[str], Path], None], arguments: list[str], root: Path) -> bool:
    """Whether a client got through, or could not be installed."""
    root.mkdir()
    try:
        run(arguments, root)
    except Skipped as reason:
        print(f"skipped  {name}: {reason}", flush=True)
    except subprocess.SubprocessError as error:
        print(f"failed   {name}: {error}", flush=True)
        return False
    else:
        print(f"ok       {name}", flush=True)
    return True


def resources_of(root: Path) -> Resources:
    """An endpoint of this machine."""
    storage = {name: str(root / name) for name in ("store", "data", "cache")}
    return Resources.model_validate({"launch": "inline", "device": "cpu", "storage": storage, "serve": {"port": 0}})


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
        raise Skipped(f"it cannot be installed: {str(error).strip().splitlines()[-1]}") from error


def python(package: str, root: Path) -> Path:
    """Make an environment with a package, and return its folder of commands."""
    venv.create(root / "venv", with_pip=True)
    commands = root / "venv/bin"
    installed([str(commands / "python"), "-m", "pip", "install", "--quiet", package], root)
    return commands


def litellm(arguments: list[str], root: Path) -> None:
    """litellm."""
    commands = python("litellm==1.110.2", root)
    called([str(commands / "python"), str(HERE / "litellm_client.py"), *arguments], root)


def langchain(arguments: list[str], root: Path) -> None:
    """LangChain's ChatOpenAI."""
    commands = python("langchain-openai==1.7.4", root)
    called([str(commands / "python"), str(HERE / "langchain_client.py"), *arguments], root)


def npm(arguments: list[str], root: Path) -> None:
    """The official client of npm."""
    node, manager = shutil.which("node"), shutil.which("npm")
    if node is None or manager is None:
        raise Skipped("node and npm are not installed")
    installed([manager, "install", "--silent", "--ignore-scripts", "--no-fund", "openai@7.55.0"], root)
    script = shutil.copy(HERE / "openai_client.mjs", root)
    called([node, str(script), *arguments], root)


def schemathesis(arguments: list[str], root: Path) -> None:
    """schemathesis makes requests from the OpenAPI schema; none may make the server fail."""
    commands = python("schemathesis==4.32.5", root)
    command = [str(commands / "schemathesis"), "run", f"{arguments[0]}/openapi.json", "--max-examples", "50"]
    called([*command, "--checks", "not_a_server_error,response_schema_conformance", "--generation-deterministic"], root)


CLIENTS = {"litellm": litellm, "langchain": langchain, "npm openai": npm, "schemathesis": schemathesis}

if __name__ == "__main__":
    sys.exit(main())
