"""The identity of a prepared mixture: its recipe without paths, and the digests of what it reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_ops.artifacts.disk import sha256
from vila_ops.artifacts.folders import folder_digest
from vila_ops.config import Mixture, Source, TextFormat
from vila_ops.config.base import fingerprint
from vila_ops.config.kinds import provenance
from vila_ops.data import sources
from vila_ops.data.images import Fit
from vila_ops.data.raw.files import RawMissing
from vila_ops.errors import RawRefused
from vila_ops.packages.normalisation import mean_std

SHARD_REVISION = 8
"""Raised if the same records become other samples."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""The files of a model's folder from which transformers builds a fast tokenizer and its chat template."""
SURVEY_REVISION = 2
"""Raised if the rules over all records drop other records."""
PLACES = {"path", "images"}
"""Settings of a source that are paths; the content is hashed instead."""
SHARES = {"weight", "repeats"}
"""Settings of a source that change an epoch, but no sample."""


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
    """The text format, with a local tokenizer by its content instead of its path, the tower by its padding colour."""
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
            if folder.is_dir():  # the revision of a local folder is only a label
                dumped["language_model"] = {"kind": "hub", "tokenizer": _tokenizer_digest(folder)}
            else:
                dumped["language_model"].pop("shape")
    return dumped


def _tokenizer_digest(folder: Path) -> str:
    return fingerprint({name: sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()})


def fit_of(text: TextFormat) -> Fit:
    """How images become squares in a text format."""
    mean, _ = mean_std(text.vision_tower)
    return Fit(text.image_aspect_ratio, mean)


@dataclass(frozen=True)
class RawDigests:
    """The digests of everything that the sources of a mixture read besides the config, by name."""

    here: dict[str, str]
    """Of the sources whose raw files are on this machine, all or in part."""
    missing: dict[str, str]
    """Why the raw files of the others, or all images of a source, are not on this machine."""


def raw_digests(mixture: Mixture, *, cache: Path) -> RawDigests:
    """The digests of the sources and of the evaluation sets (`against NAME`) of a mixture."""
    read: Mapping[str, Source] = mixture.sources
    against: Mapping[str, Source] = mixture.contamination.sources if mixture.contamination else {}
    here: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name, source in [*read.items(), *((f"against {name}", source) for name, source in against.items())]:
        try:
            here[name], images_missing = sources.digest_and_missing(source, cache=cache)
        except (RawMissing, RawRefused) as error:  # nobody may need the raw files of data that was pulled
            missing[name] = str(error)
        else:
            if images_missing:
                missing[name] = images_missing
    return RawDigests(here, missing)
