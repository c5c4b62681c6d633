"""The first section of docs/serving.md, followed in a project with a stage of the tiny recipe."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from typer.testing import CliRunner

from vila_ops.cli import app

ROOT = Path(__file__).parents[2]


class Reader:
    """Somebody who follows the section in a project, whose endpoint has a port of its own."""

    def __init__(self, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        page = (ROOT / "docs/serving.md").read_text()
        self._blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page.split("\n## ")[1], flags=re.MULTILINE | re.DOTALL)
        self._monkeypatch, self.url = monkeypatch, f"http://127.0.0.1:{port}"
        (folder / "tests").symlink_to(ROOT / "tests")  # of which the tiny recipe reads
        for name in ("recipes", "resources"):
            (folder / "configs" / name).mkdir(parents=True)
        monkeypatch.chdir(folder)

    def text_of(self, language: str) -> str:
        """The one block of a language."""
        (text,) = (text for name, text in self._blocks if name == language)
        return text

    def lines(self) -> list[str]:
        """The commands of the section."""
        return [line for name, text in self._blocks if name == "sh" for line in text.splitlines()]

    def said(self, line: str) -> str:
        """What a command prints."""
        line = line.replace("http://127.0.0.1:8000", self.url)
        if exported := re.fullmatch(r"export (\w+)=\$\((.*)\)", line):
            self._monkeypatch.setenv(exported[1], self.said(exported[2]).strip())
            return ""
        program, *words = shlex.split(os.path.expandvars(line))
        if program == "curl":
            _, address, _, header = words
            return httpx.get(address, headers=[header.split(": ")], trust_env=False).text
        assert program == "vila-ops"
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{line}: {done.output} {done.exception!r}"
        return done.stdout

    def answering(self) -> str | None:
        """The digest of what answers who has the key; who has none is refused."""
        assert httpx.get(f"{self.url}/v1/models", trust_env=False).status_code == 401
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=os.environ["VILA_API_KEY"], max_retries=0)
        messages = [{"role": "user", "content": "Hello"}]
        return client.chat.completions.create(model="mine", messages=messages, max_tokens=2).system_fingerprint


@pytest.fixture
def reader(
    tmp_path: Path, empty_database: Path, free_ports: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    """With a registry in a file; what is still served at the end of the test ends with it."""
    port = free_ports(1)[0]
    made = Reader(tmp_path, port, monkeypatch)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    inline = {"launch": "inline", "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}, "serve": {"port": port}}
    Path("configs/resources/inline.yaml").write_text(yaml.safe_dump(inline))
    Path("protected.yaml").write_text(made.text_of("yaml"))
    yield made
    CliRunner().invoke(app, ["undeploy", "configs/recipes/mine.yaml", "-r", "protected.yaml"])


def write_recipe(weight: float) -> None:
    """The stage `sft` of the tiny recipe alone, with a weight of its instructions, and the one metric of its gate."""
    recipe = yaml.safe_load((ROOT / "configs/recipes/tiny.yaml").read_text())
    recipe |= {"extends": [str(ROOT / "configs/services/default.yaml")], "service": {"name": "mine"}}
    recipe["stages"] = {"sft": recipe["stages"]["sft"]}
    recipe["stages"]["sft"]["mixture"]["sources"]["instructions"]["weight"] = weight
    recipe["final_suite"]["benchmarks"] = {"text_loss": {"kind": "text_loss"}}
    recipe["gate"]["model_name"] = "mine"
    Path("configs/recipes/mine.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.slow
def test_the_page_on_serving_leads_to_a_protected_endpoint_with_a_canary(reader: Reader) -> None:
    write_recipe(weight=0.5)
    key, deploy, listed, *changed = reader.lines()
    register, canary, promote, rollback, undeploy = changed
    for line in (key, deploy):
        reader.said(line)
    (trained,) = Path("store/checkpoint").glob("*/manifest.json")
    first = json.loads(trained.read_text())["digest"]
    assert [model["digest"] for model in json.loads(reader.said(listed))["data"]] == [first]
    assert reader.answering() == first

    write_recipe(weight=0.25)
    assert json.loads(reader.said(register))["version"] == 2
    second = json.loads(reader.said(canary))
    assert (second["url"], second["version"], second["model"] != first) == (reader.url, 2, True)
    assert reader.answering() in (first, second["model"])
    reader.said(promote)
    assert reader.answering() == second["model"]
    reader.said(rollback)
    assert reader.answering() == first
    reader.said(undeploy)
    with pytest.raises(httpx.ConnectError):
        httpx.get(reader.url, trust_env=False)
