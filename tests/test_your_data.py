"""docs/your-data.md, followed command by command, with a small model in the place of the pretrained one."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from vila_ops.cli import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/your-data.md").read_text()
COLOURS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("square", "circle")
COUNT = 60
MODEL = {
    "vision_tower": {"kind": "random"},
    "projector": {"kind": "mlp_gelu"},
    "language_model": {"kind": "random", "tokenizer": str(ROOT / "tests/tiny/tokenizer")},
    "image_size": 28,
    "patch_size": 14,
}


def commands(start: str, stop: str) -> list[str]:
    """The lines of the page's `sh` blocks between two headings."""
    part = PAGE[PAGE.index(f"\n## {start}\n") : PAGE.index(f"\n## {stop}\n")]
    blocks = re.findall(r"^```sh\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def draw(folder: Path) -> list[tuple[str, str, str]]:
    """Images of shapes in a folder: the name, colour and shape of each."""
    folder.mkdir(parents=True)
    drawn = []
    for number in range(1, COUNT + 1):
        colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
        image = Image.new("RGB", (40, 30), "white")
        pen = ImageDraw.Draw(image)
        (pen.rectangle if shape == "square" else pen.ellipse)((4, 4, 24, 24), fill=colour)
        image.save(folder / f"{number:04}.jpg")
        drawn.append((f"{number:04}.jpg", colour, shape))
    return drawn


class Reader:
    """Somebody who follows the page: runs each command where the ones before it led to."""

    def __init__(self, folder: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.port, self._monkeypatch = port, monkeypatch
        monkeypatch.chdir(folder)
        self.uri = ""
        self.said: dict[str, str] = {}
        """By the command's first word after `vila-ops`, or its program: what it printed last."""

    def follow(self, line: str) -> None:
        """Run one line of the page."""
        line = line.replace(":8000/", f":{self.port}/").replace("store/checkpoint/ADDRESS", self.uri)
        program, *words = shlex.split(line)
        match program:
            case "cd":
                self._monkeypatch.chdir(words[0])
            case "vila-ops":
                self.said[words[0]] = self._vila_ops(words)
            case "curl" if shutil.which("curl") is None:
                address, body = words[1], Path(words[-1].removeprefix("@"))
                self.said[program] = httpx.post(
                    address, json=json.loads(body.read_text()), trust_env=False, timeout=1200
                ).text
            case _:
                done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=1200, check=True)
                self.said[program] = done.stdout

    def _vila_ops(self, words: list[str]) -> str:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{words}: {result.output} {result.exception!r}"
        if words[0] == "init":
            self._choose_a_small_model(Path(words[1]))
        if words[0] == "train":
            self.uri = json.loads(result.stdout)["uri"]
        return result.stdout

    def _choose_a_small_model(self, project: Path) -> None:
        (model,) = (project / "configs/models").iterdir()
        model.write_text(yaml.safe_dump(MODEL))
        resources = project / "configs/resources/inline.yaml"
        places = {"store": "store", "cache": "cache", "data": "data"}
        settings = yaml.safe_load(resources.read_text())
        settings |= {"storage": places, "serve": {"port": self.port}, "train": {}, "evaluate": {}}
        resources.write_text(yaml.safe_dump(settings))


@pytest.fixture
def reader(tmp_path: Path, free_ports: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A reader in an empty folder; what is still served at the end of the test ends with it."""
    made = Reader(tmp_path, free_ports(1)[0], monkeypatch)
    yield made
    with contextlib.suppress(AssertionError):
        if Path("configs/recipes").is_dir():
            (recipe,) = Path("configs/recipes").iterdir()
            CliRunner().invoke(app, ["undeploy", str(recipe)])


def table_of(said: str) -> dict[tuple[str, str], list[str]]:
    """The printed scores by name and role: value, interval and number of items."""
    rows = [re.split(r"  +", line) for line in said.splitlines()[3:]]
    return {(row[0], row[1]): row[2:] for row in rows}


def held_out(split: str) -> int:
    """Rows of the only dataset in the project's store that belong to a split."""
    (index,) = Path("store/dataset").glob("*/*/index.parquet")
    return len(pq.read_table(index, filters=[("split", "=", split)]))


@pytest.mark.slow
def test_from_a_table_to_a_served_answer(reader: Reader, tmp_path: Path) -> None:
    rows = [f"{name},A {colour} {shape}." for name, colour, shape in draw(tmp_path / "mine/images")]
    (tmp_path / "mine/captions.csv").write_text("\n".join(["image,text", *rows, ""]))
    for line in commands("1. Images and a table", "From a LLaVA JSON"):
        reader.follow(line)
    assert f"{COUNT} records, {COUNT} images, 0 faults" in reader.said["data"] or Path("samples.html").is_file()
    scores = table_of(reader.said["evaluate"])
    assert {name for name, _ in scores} == {"held_out_loss", "cider"}
    value, interval, items, unit = scores["held_out_loss", "model"]
    low, high = json.loads(interval)
    assert low <= float(value) <= high
    assert (int(items), unit) == (held_out("test"), "nats per token")
    trained = json.loads(reader.said["train"])
    answer = json.loads(reader.said["curl"])
    assert answer["system_fingerprint"] == trained["digest"]
    assert isinstance(answer["choices"][0]["message"]["content"], str)
    assert reader.said["generate"].endswith("\n")
    assert reader.said["export"].split()[:2] == ["transformers", "yes"]
    assert (Path("model") / "config.json").is_file()
    with pytest.raises(httpx.ConnectError):  # undeployed
        httpx.get(f"http://127.0.0.1:{reader.port}/health", trust_env=False)


@pytest.mark.slow
def test_from_a_llava_json_to_scores(reader: Reader, tmp_path: Path) -> None:
    def record(name: str, colour: str, shape: str) -> dict[str, Any]:
        turns = [
            ("human", "<image>\nWhat colour is it?"),
            ("gpt", f"{colour}."),
            ("human", "What is it?"),
            ("gpt", shape),
        ]
        return {"id": name, "image": name, "conversations": [{"from": who, "value": text} for who, text in turns]}

    records = [record(*drawn) for drawn in draw(tmp_path / "chat/images")]
    (tmp_path / "chat/llava.json").write_text(json.dumps(records))
    for line in commands("From a LLaVA JSON", "Larger models"):
        reader.follow(line)
    scores = table_of(reader.said["evaluate"])
    assert {name for name, _ in scores} == {"held_out_loss", "answer_match"}
    colours = [record["conversations"][1]["value"] for record in records if is_tested(record["image"])]
    assert {int(row[-2]) for row in scores.values()} == {len(colours)}
    chance = max(colours.count(colour) for colour in colours) / len(colours)
    assert float(scores["answer_match", "chance"][0]) == pytest.approx(chance, abs=5e-4)


def is_tested(name: str) -> bool:
    """Whether the record of an image is in the test split of the project's only dataset."""
    (index,) = Path("store/dataset").glob("*/*/index.parquet")
    return name in pq.read_table(index, filters=[("split", "=", "test")])["object"].to_pylist()
