"""YAML files to a frozen Run: one composition rule, `extends`, and dotted overrides."""

import re
from pathlib import Path
from typing import Any

import yaml

from vila_ops.config.resources import Resources
from vila_ops.config.run import Run


def load(recipe: Path, *, resources: Path, overrides: tuple[str, ...] = ()) -> Run:
    """The run of a recipe file on a resources file, with overrides like `stages.sft.learning_rate=1e-5`.

    An override that starts with `resources.` changes the resources, any other the recipe.
    """
    tree = {"recipe": read(recipe), "resources": read(resources)}
    for override in overrides:
        key, value = key_and_value(override)
        path = key.split(".") if key.startswith("resources.") else ["recipe", *key.split(".")]
        tree = _set(tree, path, value, override)
    return Run.model_validate(tree)


def key_and_value(override: str) -> tuple[str, Any]:
    """The parts of KEY=VALUE, the value as YAML reads it."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"override {override!r} has no '='; write it like stages.sft.learning_rate=1e-5")
    try:
        return key, yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"override {override!r}: {text!r} is not valid YAML: {error}") from error


def load_resources(path: Path) -> Resources:
    """The resources of a file."""
    return Resources.model_validate(read(path))


def read(path: Path) -> dict[str, Any]:
    """One YAML file; a mapping in it, at any depth, merges the files it `extends`, left to right, itself last."""
    return _read(path.resolve(), ())


def merge(base: Any, over: Any) -> Any:
    """Mappings merge key by key; everything else, and a mapping whose `kind` changes, is replaced whole."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "kind" in base and "kind" in over and base["kind"] != over["kind"]:
        return over
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (1e-5 is a number), and a doubled key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if doubled := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{node.start_mark}: key {sorted(map(str, doubled))} is given twice")
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise ValueError(f"{path} extends itself through {' -> '.join(p.name for p in seen)}")
    if not path.is_file():
        origin = f" (extended by {seen[-1]})" if seen else ""
        raise ValueError(f"no such config file: {path}{origin}")
    try:
        own = yaml.load(path.read_text(), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(own, dict):
        raise ValueError(f"{path} holds {type(own).__name__}, not a mapping")
    resolved: dict[str, Any] = _resolve(own, path, seen)
    return resolved


def _resolve(node: Any, path: Path, seen: tuple[Path, ...]) -> Any:
    """A mapping with what it extends merged in, at every depth."""
    if not isinstance(node, dict):
        return node
    bases = node.get("extends", [])
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ValueError(f"{path}: extends is {bases!r}, not a list of files")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _read((path.parent / base).resolve(), (*seen, path)))
    own = {key: _resolve(value, path, seen) for key, value in node.items() if key != "extends"}
    return merge(merged, own)


def _set(tree: dict[str, Any], path: list[str], value: Any, override: str) -> dict[str, Any]:
    """A new tree: one that a YAML anchor shares between two keys must not change under both."""
    key, *rest = path
    if not rest:
        return {**tree, key: value}
    child = tree.get(key)
    if not isinstance(child, dict):
        raise ValueError(f"override {override!r}: there is no {key!r}; keys here are {sorted(tree)}")
    return {**tree, key: _set(child, rest, value, override)}
