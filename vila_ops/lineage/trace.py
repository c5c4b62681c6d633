"""What an id names in a store, and the artifacts above and below it."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from vila_ops.artifacts.store import find_manifest
from vila_ops.config import Config, Resources
from vila_ops.lineage.graph import Graph, Node, read_graph
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import ALIASES
from vila_ops.registry.register import version_of
from vila_ops.serve.app.samples import RESPONSE

LEAST_DIGITS = 8
"""Shortest start of a digest that is looked up."""
VERSION = re.compile(r"(?P<name>[^@]+)@(?P<alias>[\w.-]+)|models:/(?P<model>.+)/(?P<number>\d+)")
"""NAME@ALIAS, or models:/NAME/VERSION."""


Children = Callable[[str], Sequence[str]]


class Trace(Config):
    """An artifact with all that it was made from, and all that was made from it."""

    asked: Node
    up: tuple[Node, ...]
    """The nearest first."""
    down: tuple[Node, ...]
    recipe: Any = None
    """The part of the recipe that the artifact was made by; None for what is not in the store."""


def trace(name: str, resources: Resources) -> tuple[Trace, Graph]:
    """The trace of a digest (or its first 8 digits and more), an MLflow run id, a version, or the model that gave a
    response, and the graph it is in.

    Raises ValueError where the store has nothing of that name, or several.
    """
    store = resources.storage.store
    wanted = name.split("-")[1] if re.fullmatch(RESPONSE, name) else _digest_of_version(name, resources) or name
    for parts in (False, True):  # the parts are many, and seldom asked for
        graph = read_graph(store, parts=parts)
        matching = [
            node
            for node in graph.nodes.values()
            if name in (node.mlflow_run, node.uri) or (len(wanted) >= LEAST_DIGITS and node.digest.startswith(wanted))
        ]
        if len(matching) > 1:
            raise ValueError(f"{name!r} is the start of {len(matching)} digests; give more digits of it")
        if matching:
            (asked,) = matching
            up, down = (tuple(graph.nodes[one] for one in way(asked.digest)) for way in (graph.above, graph.below))
            manifest = None if asked.uri is None else find_manifest(asked.uri)
            return Trace(asked=asked, up=up, down=down, recipe=manifest and manifest["recipe"]), graph
    raise ValueError(
        f"{store} has nothing named {name!r}; give a digest (8 digits of it or more), the folder of an artifact, the "
        f"id of an MLflow run of a stage or an evaluation, the id of a response of a model in this store, or a "
        f"version: NAME@champion or models:/NAME/VERSION"
    )


def _digest_of_version(name: str, resources: Resources) -> str | None:
    """The digest of a registered version; None for another kind of id."""
    match = VERSION.fullmatch(name)
    if match is None:
        return None
    model, store = match["name"] or match["model"], resources.storage.store
    record = alias_register.read(model, store=store)
    if match["alias"] is None:
        number: int | None = int(match["number"])
    elif match["alias"] in ALIASES:
        number = next((at for alias, at in record.aliases().items() if alias == match["alias"]), None)
    else:
        raise ValueError(f"{name!r} has the alias {match['alias']!r}; it may be {', '.join(ALIASES)}")
    if number is None:
        raise ValueError(f"{model!r} has no version with the alias {match['alias']!r}")
    checkpoint = record.checkpoints.get(number) or version_of(model, number, resources).checkpoint
    return checkpoint.digest


def tree(trace: Trace, graph: Graph) -> list[str]:
    """The lines of a trace for a terminal: the artifact, what it was made from, and what was made from it."""
    lines = [_told(trace.asked)]
    ways: dict[str, Children] = {
        "made from": lambda one: graph.nodes[one].parents,
        "made from it": lambda one: graph.children.get(one, ()),
    }
    for title, children in ways.items():
        branch: list[str] = []
        _branch(trace.asked.digest, children, graph, branch, "  ", set())
        lines += [title, *(branch or ["  nothing"])]
    return lines


def _branch(digest: str, children: Children, graph: Graph, lines: list[str], indent: str, told: set[str]) -> None:
    for one in dict.fromkeys(children(digest)):
        again = one in told and bool(children(one))
        lines.append(f"{indent}{_told(graph.nodes[one])}{', as above' if again else ''}")
        if not again:
            told.add(one)
            _branch(one, children, graph, lines, f"{indent}  ", told)


def _told(node: Node) -> str:
    words = [node.kind, node.name, node.digest[:12], *(f"= {version}" for version in node.versions)]
    return " ".join(word for word in words if word)
