"""The artifacts of a store and what each was made from, by digest, from the manifests and the registers of aliases."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from vila_ops.artifacts.kinds import (
    Answers,
    Artifact,
    BenchmarkFiles,
    BenchmarkResult,
    Checkpoint,
    Dataset,
    Demonstrations,
    EvalReport,
    ModelCard,
    Pretrained,
    Shard,
)
from vila_ops.artifacts.listing import manifests
from vila_ops.artifacts.store import KINDS
from vila_ops.config import Config
from vila_ops.registry import alias_register

MAIN = (Dataset, Pretrained, Checkpoint, BenchmarkFiles, BenchmarkResult, EvalReport, ModelCard)
"""Kinds that a lineage is made of."""
PARTS = (Shard, Answers, Demonstrations)
"""Kinds that are parts of others: many, and each reused by itself."""
RAW = "raw"
"""In place of the kind of what is not in the store, such as raw files."""


class Node(Config):
    """One artifact, or something outside of the store that one was made from."""

    digest: str
    kind: str
    """As in the store's folders, or `raw`."""
    name: str
    """The stage, mixture, suite, benchmark or version; empty where only the digest is known."""
    parents: tuple[str, ...] = ()
    """Digests of what it was made from."""
    uri: str | None = None
    sealed: str | None = None
    """UTC, ISO 8601."""
    seconds: float = 0.0
    """How long it took to make."""
    mlflow_run: str | None = None
    versions: tuple[str, ...] = ()
    """Versions of registered models that it is, with the aliases that point to them: `vila 3 (champion)`."""


class Sealed(NamedTuple):
    """A sealed folder with its manifest."""

    kind: str
    uri: str
    manifest: dict[str, Any]


class Graph:
    """Nodes by digest."""

    def __init__(self, sealed: Iterable[Sealed], versions: dict[str, list[str]]) -> None:
        self.nodes: dict[str, Node] = {}
        sources: dict[str, str] = {}
        for one in sealed:
            node = _node(one, tuple(versions.get(one.manifest["digest"], ())))
            self.nodes.setdefault(node.digest, node)
            if one.kind == KINDS[Dataset]:
                sources |= {digest: name for name, digest in one.manifest["recipe"].get("sources", {}).items()}
        for digest in {parent for node in self.nodes.values() for parent in node.parents} - set(self.nodes):
            self.nodes[digest] = Node(digest=digest, kind=RAW, name=sources.get(digest, ""))

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """Digests of what was made from each node, in the order in which it was sealed."""
        children: dict[str, list[str]] = defaultdict(list)
        for node in sorted(self.nodes.values(), key=lambda one: (one.sealed or "", one.digest)):
            for parent in dict.fromkeys(node.parents):
                children[parent].append(node.digest)
        return children

    def above(self, digest: str) -> list[str]:
        """Digests of everything that a node was made from, itself not included, the nearest first."""
        return _reached(digest, lambda one: self.nodes[one].parents)

    def below(self, digest: str) -> list[str]:
        """Digests of everything that was made from a node, itself not included, the nearest first."""
        return _reached(digest, lambda one: self.children.get(one, ()))


def read_graph(store: str, *, parts: bool = False) -> Graph:
    """The artifacts of a store, with their parts if asked. Raises CorruptArtifact for a damaged one."""
    return Graph(sealed_of((*MAIN, *PARTS) if parts else MAIN, store=store), versions_of(store))


def sealed_of(kinds: Iterable[type[Artifact]], *, store: str) -> list[Sealed]:
    """Every sealed folder of some kinds."""
    return [Sealed(KINDS[kind], uri, manifest) for kind in kinds for uri, manifest in manifests(kind, store=store)]


def versions_of(store: str) -> dict[str, list[str]]:
    """The registered versions of checkpoints that aliases have pointed to, by digest."""
    versions: dict[str, list[str]] = defaultdict(list)
    for name in alias_register.names(store=store):
        record = alias_register.read(name, store=store)
        for version, checkpoint in record.checkpoints.items():
            aliases = [alias for alias, at in record.aliases().items() if at == version]
            pointed = f" ({', '.join(aliases)})" if aliases else ""
            versions[checkpoint.digest].append(f"{name} {version}{pointed}")
    return versions


def _node(one: Sealed, versions: tuple[str, ...]) -> Node:
    manifest, execution = one.manifest, one.manifest["execution"]
    return Node(
        digest=manifest["digest"],
        kind=one.kind,
        name=_name(one.kind, manifest),
        parents=tuple(manifest["parents"]),
        uri=one.uri,
        sealed=execution.get("sealed"),
        seconds=execution.get("seconds", 0.0),
        mlflow_run=execution.get("mlflow_run"),
        versions=versions,
    )


def _name(kind: str, manifest: dict[str, Any]) -> str:
    facts, recipe = manifest["facts"], manifest["recipe"]
    if kind == KINDS[Dataset]:
        return str(recipe["mixture"]["name"])
    if kind == KINDS[Shard]:
        return str(recipe["source"]["name"])
    if kind == KINDS[ModelCard]:
        return f"{facts['name']} {facts['version']}"
    return str(next((facts[key] for key in ("stage", "suite", "benchmark") if key in facts), ""))


def _reached(start: str, step: Callable[[str], Sequence[str]]) -> list[str]:
    """What can be reached from a node, in the order of its distance."""
    reached: dict[str, None] = {}
    front = [start]
    while front:
        near = dict.fromkeys(other for one in front for other in step(one))
        front = [one for one in near if one not in reached and one != start]
        reached |= dict.fromkeys(front)
    return list(reached)
