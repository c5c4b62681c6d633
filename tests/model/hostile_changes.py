"""Changes that hostile_folders.py makes to a copy of a valid model folder."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

CANARY = "canary"
PAYLOAD = f"import os; open(os.environ['{CANARY}'], 'w')"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST = "model.multi_modal_projector.linear_1.weight"
SECOND = "model.multi_modal_projector.linear_2.bias"

Change = Callable[[Path], object]


class Payload:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> Any:
        return exec, (PAYLOAD,)


def put(name: str, data: bytes) -> Change:
    def change(at: Path) -> None:
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).unlink(missing_ok=True)
        (at / name).write_bytes(data)

    return change


def both(first: Change, second: Change) -> Change:
    return lambda at: (first(at), second(at))


def remove(name: str) -> Change:
    return lambda at: (at / name).unlink()


def folder(name: str) -> Change:
    return lambda at: (at / name).mkdir()


def pipe(name: str) -> Change:
    return lambda at: os.mkfifo(at / name)


def link(name: str, target: str) -> Change:
    def change(at: Path) -> None:
        (at / name).unlink(missing_ok=True)
        (at / name).symlink_to(target)

    return change


def cut(name: str) -> Change:
    return lambda at: (at / name).write_bytes((data := (at / name).read_bytes())[: len(data) // 2])


def half(at: Path) -> None:
    cut(WEIGHTS)(at)


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def edit(name: str, **fields: Any) -> Change:
    def change(at: Path) -> None:
        stated = json.loads((at / name).read_text()) if (at / name).is_file() else {}
        put(name, json.dumps({**stated, **fields}).encode())(at)

    return change


def edit_in(name: str, part: str, **fields: Any) -> Change:
    def change(at: Path) -> None:
        stated = json.loads((at / name).read_text())
        edit(name, **{part: {**stated[part], **fields}})(at)

    return change


def header(lie: Callable[[dict[str, Any]], object]) -> Change:
    def change(at: Path) -> None:
        data = (at / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        stated = json.loads(data[8 : 8 + length])
        lie(stated)
        text = json.dumps(stated).encode()
        put(WEIGHTS, struct.pack("<Q", len(text)) + text + data[8 + length :])(at)

    return change


def tensors(lie: Callable[[dict[str, Any]], object]) -> Change:
    def change(at: Path) -> None:
        state = load_file(at / WEIGHTS)
        lie(state)
        save_file(state, at / WEIGHTS)

    return change


def index(lie: Callable[[dict[str, Any]], object]) -> Change:
    def change(at: Path) -> None:
        places = dict.fromkeys(load_file(at / WEIGHTS), WEIGHTS)
        lie(places)
        put(INDEX, json.dumps({"weight_map": places}).encode())(at)

    return change


def two_files(at: Path) -> None:
    index(lambda places: places.update({FIRST: "more.safetensors"}))(at)
    shutil.copy(at / WEIGHTS, at / "more.safetensors")


def tokenizer(lie: Callable[[dict[str, Any]], object]) -> Change:
    def change(at: Path) -> None:
        stated = json.loads((at / "tokenizer.json").read_text())
        lie(stated)
        put("tokenizer.json", json.dumps(stated).encode())(at)

    return change


def added(stated: dict[str, Any], *, id: Any) -> None:
    stated["added_tokens"].append({**stated["added_tokens"][-1], "content": "<evil>", "id": id})


def rename_token(stated: dict[str, Any], old: str, new: str) -> None:
    for token in stated["added_tokens"]:
        token["content"] = token["content"].replace(old, new)
    stated["model"]["vocab"] = {name.replace(old, new): id for name, id in stated["model"]["vocab"].items()}


def bad_regex(stated: dict[str, Any]) -> None:
    stated["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}


def template(text: str) -> Change:
    return put("chat_template.jinja", text.encode())


def another_layer(state: dict[str, Any]) -> None:
    name = "model.language_model.layers.{}.mlp.up_proj.weight"
    state[name.format(2)] = state[name.format(1)].clone()


def another_head(state: dict[str, Any]) -> None:
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"] + 1


def drop(state: dict[str, Any], ending: str) -> None:
    del state[next(name for name in state if name.endswith(ending))]


def widen(state: dict[str, Any], ending: str) -> None:
    name = next(name for name in state if name.endswith(ending))
    state[name] = state[name].repeat(2)


def torch_archive(at: Path) -> None:
    with zipfile.ZipFile(at / "archive", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload()))
    (at / "archive").replace(at / WEIGHTS)


def many_files(at: Path) -> None:
    (at / "notes").mkdir()
    for number in range(10_001):
        (at / "notes" / f"{number}.txt").touch()
