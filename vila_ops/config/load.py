"""YAML files to a frozen Run: one composition rule, `extends`, and dotted overrides."""

import re
import shlex
from pathlib import Path
from typing import Any, Union, get_origin

import yaml

from vila_ops.config.base import Config
from vila_ops.config.context import RunContext
from vila_ops.config.eval import OfficialSuite
from vila_ops.config.named import config_file
from vila_ops.config.resources import Resources
from vila_ops.config.retrain import RetrainPolicy
from vila_ops.config.run import Recipe, Run
from vila_ops.config.schema import configs, members, value_types
from vila_ops.errors import did_you_mean

BASES = "extends"
"""Key of a mapping that lists the files to merge into it."""


def load(recipe: Path, *, resources: Path, overrides: tuple[str, ...] = ()) -> Run:
    """The run of a recipe on resources, each a file or a name, with overrides like `stages.sft.learning_rate=1e-5`.

    An override that starts with `resources.` changes the resources, any other the recipe.
    """
    return _run({"recipe": _recipe(recipe), "resources": _resources(resources)}, overrides)


def _recipe(given: Path) -> dict[str, Any]:
    return read_as(Recipe, given, "recipes", what="a recipe")


def _resources(given: Path) -> dict[str, Any]:
    return read_as(Resources, given, "resources", what="resources")


def _run(tree: dict[str, Any], overrides: tuple[str, ...]) -> Run:
    for override in overrides:
        key, value = key_and_value(override)
        path = key.split(".") if key.startswith("resources.") else ["recipe", *key.split(".")]
        tree = _set(tree, path, value, override, Run)
    return Run.model_validate(tree)


def run_of(recipe: str | Recipe, resources: str | Resources, overrides: tuple[str, ...] = ()) -> Run:
    """The run of a recipe and resources, each by its name in `configs/`, by the path of its file, or as a whole.

    Raises ValueError for an unknown name.
    """
    tree = {
        "recipe": _recipe(Path(recipe)) if isinstance(recipe, str) else recipe.model_dump(mode="json"),
        "resources": _resources(Path(resources)) if isinstance(resources, str) else resources.model_dump(mode="json"),
    }
    return _run(tree, overrides)


def context_of(recipe: Path, *, resources: Path, overrides: tuple[str, ...] = ()) -> RunContext:
    """The context of a command that loads such a run, with the command's arguments."""
    settings = [part for override in overrides for part in ("-s", override)]
    return RunContext(command=shlex.join([str(recipe), "-r", str(resources), *settings]))


def key_and_value(override: str) -> tuple[str, Any]:
    """Key and value of KEY=VALUE; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"override {override!r} has no '='; write it like stages.sft.learning_rate=1e-5")
    try:
        return key, yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"override {override!r}: {text!r} is not valid YAML: {error}") from error


def load_resources(path: Path, *, overrides: tuple[str, ...] = ()) -> Resources:
    """The resources in a YAML file, with overrides like `resources.storage.store=DIR`. Raises ValueError for others."""
    tree: dict[str, Any] = {"resources": _resources(path)}
    for override in overrides:
        key, value = key_and_value(override)
        if not key.startswith("resources."):
            raise ValueError(f"override {override!r} is of a recipe; here only resources.KEY=VALUE has an effect")
        tree = _set(tree, key.split("."), value, override, Run)
    return Resources.model_validate(tree["resources"])


def policy_of(policy: str | RetrainPolicy) -> RetrainPolicy:
    """Rules of retraining by their name in `configs/retrain`, by the path of their file, or as a whole.

    Raises ValueError for an unknown name.
    """
    return load_policy(Path(policy)) if isinstance(policy, str) else policy


def load_policy(path: Path) -> RetrainPolicy:
    """The rules of retraining in a YAML file."""
    return RetrainPolicy.model_validate(read_as(RetrainPolicy, path, "retrain", what="a policy of retraining"))


def load_suite(path: Path) -> OfficialSuite:
    """The suite of official benchmarks in a YAML file."""
    return OfficialSuite.model_validate(read_as(OfficialSuite, path, "suites", what="a suite of official benchmarks"))


def read(path: Path) -> dict[str, Any]:
    """The content of a YAML file; each mapping in it merges the files that it `extends`, left to right, itself last."""
    return _read(path.resolve(), ())


def read_as(kind: type[Config], given: Path, folder: str, *, what: str) -> dict[str, Any]:
    """The content of a file, or of a name in a folder of `configs/`, that holds settings of a kind.

    Raises ValueError for a file of another kind: it lacks most of what the kind requires, or has none of its keys.
    """
    path = config_file(given, folder)
    tree = read(path)
    required = [name for name, field in kind.model_fields.items() if field.is_required()]
    lacking = [name for name in required if name not in tree]
    if 2 * len(lacking) > len(required) or (tree and not tree.keys() & kind.model_fields.keys()):
        lacks = f"it lacks {', '.join(lacking)}, and " if lacking else ""
        what = f"{what} (configs/{folder})" if folder else f"{what} (configs)"
        raise ValueError(f"{path} does not hold {what}: {lacks}its keys are {', '.join(map(str, tree)) or 'none'}")
    return tree


def merge(base: Any, over: Any) -> Any:
    """Merge mappings key by key; replace any other value, and a mapping whose `kind` changes, as a whole."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "kind" in base and "kind" in over and base["kind"] != over["kind"]:
        return over
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}


class Loader(yaml.CSafeLoader):
    """A YAML loader for which 1e-5 is a number, as in YAML 1.2, and a repeated key an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if doubled := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{node.start_mark}: key {sorted(map(str, doubled))} is given twice")
        return super().construct_mapping(node, deep=deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise ValueError(f"{path} extends itself through {' -> '.join(p.name for p in seen)}")
    if not path.is_file():
        origin = f" (extended by {seen[-1]})" if seen else ""
        near = did_you_mean(path.name, (one.name for one in path.parent.glob("*.yaml")))
        raise ValueError(f"no such config file: {path}{origin}{near}")
    try:
        own = yaml.load(path.read_text(), Loader=Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(own, dict):
        raise ValueError(f"{path} holds {type(own).__name__}, not a mapping")
    resolved: dict[str, Any] = resolve(own, path, seen)
    return resolved


def resolve(node: Any, path: Path, seen: tuple[Path, ...] = ()) -> Any:
    """A value of a file, with the files that its mappings extend merged in at every depth."""
    if not isinstance(node, dict):
        return node
    bases = node.get(BASES, [])
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ValueError(f"{path}: extends is {bases!r}, not a list of files")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _read((path.parent / base).resolve(), (*seen, path)))
    own = {key: resolve(value, path, seen) for key, value in node.items() if key != BASES}
    return merge(merged, own)


def _set(tree: dict[str, Any], path: list[str], value: Any, override: str, annotation: Any) -> dict[str, Any]:
    """A new tree with a value at a path; a subtree that a YAML anchor shares between two keys changes under one only.

    `annotation` is the type of the tree. A path may enter a mapping that the files leave to its default.
    """
    key, *rest = path
    if not rest:
        return {"kind": value} if key == "kind" and tree.get(key, value) != value else {**tree, key: value}
    inner = value_types(annotation, key)
    child = tree.get(key, {} if _may_be_left_out(annotation, inner) else None)
    if not isinstance(child, dict):
        hint = did_you_mean(key, tree)
        if not hint and annotation is Recipe and key in Resources.model_fields:
            hint = f"; did you mean resources.{override}?"
        raise ValueError(f"override {override!r}: no key {key!r}; keys here are {sorted(tree)}{hint}")
    below: Any = Union[tuple(inner) or (Any,)]  # noqa: UP007 a list of types
    return {**tree, key: _set(child, rest, value, override, below)}


def _may_be_left_out(annotation: Any, values: list[Any]) -> bool:
    """Whether a file may leave out a mapping of these types, so that an override may begin it."""
    if any(get_origin(member) is dict for member in members(annotation)):
        held = (one for value in values for one in configs(value))
        return not any(field.is_required() for one in held for field in one.model_fields.values())
    return any(configs(one) or get_origin(one) is dict for one in values)
