"""What a prepared mixture is made of, in words that do not depend on where things lie."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila_ops.artifacts.disk import sha256
from vila_ops.artifacts.folders import folder_digest
from vila_ops.config import Mixture, Source, TextFormat
from vila_ops.config.base import fingerprint
from vila_ops.config.kinds import provenance
from vila_ops.data import sources
from vila_ops.data.images import Fit
from vila_ops.packages.normalisation import mean_std

SHARD_REVISION = 5
"""Bumped when the same records become other samples."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""All that transformers reads of a model's folder to make a fast tokenizer and its chat template."""
SURVEY_REVISION = 1
"""Bumped when the rules over all records take out others."""
PLACES = {"path", "images"}
"""Of a source: their content is hashed instead."""
SHARES = {"weight", "repeats"}
"""Of a source: how much of it an epoch has changes no sample."""


def source_recipe(source: Source) -> dict[str, Any]:
    """The settings of a source that shape its samples; for a plugin's kind its package, version and revision too."""
    return _recipe(source, without=PLACES | SHARES)


def mixture_recipe(mixture: Mixture) -> dict[str, Any]:
    """The mixture without the paths of its raw files, whose digests are the parents."""
    dumped = mixture.model_dump(mode="json")
    dumped["sources"] = {name: _recipe(source, without=PLACES) for name, source in mixture.sources.items()}
    if mixture.contamination:
        against = mixture.contamination.sources
        dumped["contamination"]["sources"] = {name: _recipe(one, without=PLACES) for name, one in against.items()}
    return dumped


def _recipe(source: Source, *, without: set[str]) -> dict[str, Any]:
    dumped = source.model_dump(mode="json", exclude=without)
    plugin = provenance(sources.GROUP, sources.SOURCES, source.kind)
    return {**dumped, "plugin": plugin} if plugin else dumped


def text_recipe(text: TextFormat) -> dict[str, Any]:
    """The text format; a local tokenizer by its content instead of its place, the tower by the colour that pads."""
    dumped = text.model_dump(mode="json", exclude={"vision_tower"})
    if text.image_aspect_ratio == "pad":
        dumped["colour"] = list(fit_of(text).colour)
    match text.language_model.kind:
        case "random":
            content = folder_digest(Path(text.language_model.tokenizer))
            dumped["language_model"] = {"kind": "random", "tokenizer": content}
        case "package":
            package, gguf = text.language_model.package, text.language_model.gguf
            dumped["language_model"] = {"kind": "package", "sha256": package.sha256, "gguf": gguf}
        case "hub":
            folder = Path(text.language_model.name)
            if folder.is_dir():  # its revision is a label, which says nothing of what lies there now
                dumped["language_model"] = {"kind": "hub", "tokenizer": _tokenizer_digest(folder)}
            else:
                dumped["language_model"].pop("shape")
    return dumped


def _tokenizer_digest(folder: Path) -> str:
    return fingerprint({name: sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()})


def fit_of(text: TextFormat) -> Fit:
    """How the images of a text format become squares."""
    mean, _ = mean_std(text.vision_tower)
    return Fit(text.image_aspect_ratio, mean)


def digests(mixture: Mixture, *, cache: Path) -> dict[str, str]:
    """A digest of each source by its name: of all that is read from outside the config."""
    read: Mapping[str, Source] = mixture.sources
    against: Mapping[str, Source] = mixture.contamination.sources if mixture.contamination else {}
    own = {name: sources.digest(source, cache=cache) for name, source in read.items()}
    return own | {f"against {name}": sources.digest(source, cache=cache) for name, source in against.items()}
