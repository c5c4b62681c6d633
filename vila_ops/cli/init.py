"""`vila-ops init`: the files of a project on the user's own data, from the templates in `project/`."""

import json
import os
import re
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vila_ops.cli.options import AsJson, as_yaml, say

if TYPE_CHECKING:
    from vila_ops.config import Source

TEMPLATES = Path(__file__).with_name("project")
FILES = {
    "recipe.yaml": "configs/recipes/{name}.yaml",
    "model.yaml": "configs/models/{name}.yaml",
    "mixture.yaml": "configs/mixtures/{name}.yaml",
    "resources.yaml": "configs/resources/inline.yaml",
    "pipeline.yaml": "dvc.yaml",
    "prefect.toml": "prefect.toml",
    "gitignore": ".gitignore",
}
"""Templates, and the files that are made of them."""
PLACEHOLDER = {"kind": "table", "path": "raw/captions.csv", "images": "raw/images", "render": "caption"}
"""The source of a project without data."""
PLACES = ("path", "images")
"""Settings of a source that are paths."""
MOST_THREADS = 8
"""More threads do not make small models faster."""


def init(
    folder: Annotated[Path, typer.Argument(help="The project's folder; its name becomes the project's")],
    data: Annotated[
        str | None, typer.Option("--data", help="Your raw data, in any format that `data lint` reads")
    ] = None,
    kind: Annotated[str | None, typer.Option("--format", help="Its format; default: detected from its content")] = None,
    images: Annotated[str | None, typer.Option("--images", help="Folder of the images that the records name")] = None,
    own: Annotated[
        list[str] | None, typer.Option("-s", "--set", help="A setting of the source, e.g. image=file or question=q")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a project on your own data: recipe, model, mixture, resources and dvc.yaml. No file is overwritten.

    Without --data the mixture names raw/captions.csv and raw/images, where you put yours.
    """
    from vila_ops.config.load import key_and_value

    if data is None:
        if kind or images or own:
            raise ValueError("--format, --images and --set say how --data is read; give --data too")
        source = dict(PLACEHOLDER)
    else:
        from vila_ops.data.inspect.guess import guess

        source = _settings(guess(data, kind=kind, images=images, own=dict(map(key_and_value, own or ()))), folder)
    name = _name(folder)
    written = write(folder, name, source)
    if as_json:
        say(json.dumps({"name": name, "files": [str(path) for path in written]}))
        return
    say("\n".join(f"wrote {path}" for path in written))
    _say_what_is_next(folder, name, source, has_data=data is not None)


def write(folder: Path, name: str, source: dict[str, Any]) -> list[Path]:
    """Write the files of a project; returns them. `source` are the settings of its source.

    Raises ValueError, before it writes anything, where one of the files exists, .gitignore apart, which is left as it
    is.
    """
    targets = {template: folder / path.format(name=name) for template, path in FILES.items()}
    if targets["gitignore"].exists():
        del targets["gitignore"]
    if taken := [str(path) for path in targets.values() if path.exists() or path.is_symlink()]:
        raise ValueError(f"{', '.join(taken)} exists, and init overwrites nothing; name another folder")
    values = {
        "name": name,
        "source": _nested({"licence": "NOASSERTION", **source}, 4),
        "benchmarks": _nested(_benchmarks(source["render"]), 4),
        "raw": _nested([source[key] for key in PLACES if key in source], 8),
        "threads": str(min(MOST_THREADS, len(os.sched_getaffinity(0)))),
    }
    for template, path in targets.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(Template((TEMPLATES / template).read_text(encoding="utf-8")).safe_substitute(values))
    return list(targets.values())


def _name(folder: Path) -> str:
    """A name for files and configs, from the folder's own; one that YAML reads as another value gets a prefix."""
    from vila_ops.config.load import key_and_value

    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-._") or "mine"
    return name if key_and_value(f"name={name}")[1] == name else f"data-{name}"


def _settings(source: "Source", folder: Path) -> dict[str, Any]:
    """The settings of a source that differ from the defaults, with paths as a command in the folder finds them.

    Raises ValueError where raw data would contain the project, and so what it prepares from it.
    """
    from vila_ops.data.raw.objects import raw_path

    dumped = source.model_dump(mode="json", exclude_defaults=True)
    settings = {"kind": source.kind, **dumped, "render": source.render}
    root = folder.resolve()
    for key in PLACES:
        if key in settings:
            place = raw_path(settings[key]).resolve()
            if root.is_relative_to(place):
                raise ValueError(f"{settings[key]} contains the project {folder}; name a folder beside it, or below it")
            settings[key] = str(place.relative_to(root) if place.is_relative_to(root) else place)
    return settings


def _benchmarks(render: str) -> dict[str, Any]:
    """What a suite can measure on such records; see `config.eval`."""
    from vila_ops.config.eval import CONVERSATIONS, CaptionCider, HeldOutLoss

    control = {} if render in HeldOutLoss().reads() else {"control": "none"}
    chosen: dict[str, Any] = {"held_out_loss": {"kind": "held_out_loss", **control}}
    if render in CaptionCider().reads():
        chosen["cider"] = {"kind": "cider", "max_new_tokens": 32}
    if render in CONVERSATIONS:
        chosen["answer_match"] = {"kind": "answer_match", **control}
    return chosen


def _nested(settings: dict[str, Any] | list[Any], indent: int) -> str:
    """Settings as YAML below a key; the first line is indented by the template."""
    return as_yaml(settings).replace("\n", "\n" + " " * indent)


def _say_what_is_next(folder: Path, name: str, source: dict[str, Any], *, has_data: bool) -> None:
    recipe = f"configs/recipes/{name}.yaml"
    steps = [
        f"vila-ops show {recipe}",
        f"vila-ops prepare {recipe} --mixture {name}",
        f"vila-ops evaluate {recipe} --stage sft --final   # trains first",
    ]
    if not has_data:
        steps.insert(0, f"vila-ops data lint {source['path']} --images {source['images']}")
        say(f"put your table into {folder / source['path']} (columns image, text), its images into "
            f"{folder / source['images']}")  # fmt: skip
    say("\n".join([f"next, in {folder}:", *(f"  {step}" for step in steps)]))
