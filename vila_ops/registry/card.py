"""The model card of a registered version, in Markdown: what it was made from, what was measured, and what was not.

All of it is read from manifests and reports of the checkpoint's store, so that it says the same as `vila-ops trace`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vila_ops.artifacts import attempts, store
from vila_ops.artifacts.execution import execution
from vila_ops.artifacts.kinds import Checkpoint, Dataset, EvalReport, ModelCard, ModelVersion, Pretrained
from vila_ops.artifacts.listing import of_digest
from vila_ops.artifacts.store import file, manifest_of
from vila_ops.data.preprocess.card import inline, licences, table
from vila_ops.data.preprocess.summary import SUMMARY
from vila_ops.eval.report import Report, read_report
from vila_ops.registry.gate import GateVerdict

REVISION = 1
"""Raised if the same version gets another card."""
CARD = "README.md"
Json = dict[str, Any]


@dataclass(frozen=True)
class _Trained:
    """A stage that led to the model."""

    manifest: Json
    mixture: Json | None
    """Recipe of its data; None where the store does not have that any more."""
    summary: Json | None
    """Counts of its data."""

    @property
    def name(self) -> str:
        return str(self.manifest["facts"]["stage"])


def write_card(version: ModelVersion, report: EvalReport, verdict: GateVerdict) -> ModelCard:
    """The sealed card of a version as it was judged, in the checkpoint's store; written only if it is missing."""
    root, model = store.store_of(version.checkpoint.uri), version.checkpoint
    judged = [[check.passed, check.reason] for check in verdict.checks]
    recipe = {"name": version.name, "version": version.version, "gate": judged}
    at = store.address(ModelCard, revision=REVISION, recipe=recipe, parents=(model.digest, report.digest))
    if done := store.find(ModelCard, at, store=root):
        return done
    with attempts.attempt(at, store=root) as attempt:
        (attempt / CARD).write_text(_text(version, read_report(report), verdict, root=root), encoding="utf-8")
    facts = {"name": version.name, "version": version.version, "model": model.digest}
    return store.seal(ModelCard, at, attempt, facts=facts, execution=execution(launch="inline", seconds=0.0, ran=[]))


def text_of(card: ModelCard, *, most: int) -> str:
    """The text of a card in `most` characters; one that is longer ends with where all of it is."""
    text = file(card, CARD).read_text(encoding="utf-8")
    if len(text) <= most:
        return text
    rest = f"\n\nThe whole card is {'/'.join(card.uri.rsplit('/', 2)[1:])} of the store.\n"
    return text[: text.rindex("\n", 0, most - len(rest))] + rest


def _text(version: ModelVersion, report: Report, verdict: GateVerdict, *, root: str) -> str:
    model = version.checkpoint
    stages, base = _history(model, root)
    lines = [
        f"# {inline(version.name)} version {version.version}",
        "",
        f"Model `{model.digest}` after stage {inline(model.stage)}. The gate "
        f"{'let it through' if verdict.passed else 'refused it'}:",
        "",
        *(f"- {'holds' if check.passed else 'does not hold'}: {inline(check.reason)}" for check in verdict.checks),
        "",
        "## Base model",
        "",
        *_base(base, stages),
        "",
        "## Measured",
        "",
        *_measured(report),
        "",
        "## Limits",
        "",
        *_limits(report, stages),
        "",
        "## Stages",
        "",
        *_stages(stages),
        "",
        "## Data",
        *_data(stages),
    ]
    return "\n".join(lines) + "\n"


def _history(checkpoint: Checkpoint, root: str) -> tuple[list[_Trained], Pretrained | None]:
    """The stages that led to a model, the first one first, and the model before them, if the store has it."""
    stages: list[_Trained] = []
    model: Checkpoint | None = checkpoint
    while model is not None:
        read, init = model.parents
        data = of_digest(Dataset, read, store=root)
        mixture = None if data is None else manifest_of(data)["recipe"]["mixture"]
        summary = None if data is None else json.loads(file(data, SUMMARY).read_text())
        stages.insert(0, _Trained(manifest_of(model), mixture, summary))
        model = of_digest(Checkpoint, init, store=root)
    return stages, of_digest(Pretrained, init, store=root)


def _base(base: Pretrained | None, stages: Sequence[_Trained]) -> list[str]:
    if base is None:
        return ["The store does not have it any more."]
    recipe = manifest_of(base)["recipe"]
    rows = [[part.replace("_", " "), *_origin(recipe[part])] for part in ("vision_tower", "language_model")]
    sizes = [size for one in stages if (size := one.manifest["recipe"]["stage"]["image_size"]) is not None]
    size = sizes[-1] if sizes else recipe["image_size"]
    made = f"An image is seen as {size} × {size} pixels. Projector: {inline(recipe['projector']['kind'])}."
    whole = ["", "All weights are from the folder of a whole model."] if recipe.get("weights") else []
    return [*table(["part", "from", "licence"], rows), *whole, "", made]


def _origin(part: Json) -> list[str]:
    """Where the weights of a tower or language model are from, and their licence."""
    match part["kind"]:
        case "package":
            package = part["package"]
            named = f"{package['registry']}:{package['name']}@{package['version']}"
            return [inline(named), inline(package["licence"])]
        case "hub" if "name" in part:
            return [inline(f"{part['name']}@{part['revision']}"), "as its page says"]
        case "hub":
            return ["a local folder", "not recorded"]
        case kind:
            return [inline(f"{kind} weights"), "none"]


def _measured(report: Report) -> list[str]:
    rows = [
        [inline(one.name), one.role, f"{one.value:.4g}", f"{one.low:.4g} to {one.high:.4g}", f"{one.n:,}",
         "lower" if one.lower_is_better else "higher"]
        for one in report.metrics
    ]  # fmt: skip
    where = f", on the {report.split} split" if report.split else ""
    head = ["metric", "of", ">value", ">95 % interval", ">items", "better"]
    return [f"By suite {inline(report.suite)}{where}.", "", *table(head, rows)]


def _limits(report: Report, stages: Sequence[_Trained]) -> Iterator[str]:
    yield "- What the table above does not name was not measured, safety and bias among it."
    for name, one in report.benchmarks.items():
        for status, count in one.failed.items():
            yield f"- {count:,} requests of {inline(name)} had no answer ({inline(status)})."
        for metric, why in one.undefined.items():
            yield f"- {inline(metric)} of {inline(name)} has no number or no interval: {inline(why)}."
    if lost := [inline(one.name) for one in stages if one.mixture is None]:
        yield f"- The store does not have the data of {', '.join(lost)} any more, so that it is not listed below."
    unclean = [inline(one.name) for one in stages if one.mixture is not None and not one.mixture["contamination"]]
    if unclean:
        told = ", ".join(dict.fromkeys(unclean))
        yield f"- The data of {told} was compared with no evaluation set, so it may hold what was measured."


def _stages(stages: Sequence[_Trained]) -> list[str]:
    rows = []
    for one in stages:
        stage = one.manifest["recipe"]["stage"]
        trained = ", ".join(part.replace("_", " ") for part in stage["trainable"])
        sizes = [f"{one.manifest['facts']['step']:,}", f"{stage['global_batch_size']:,}", f"{stage['learning_rate']:g}"]
        rows.append([inline(one.name), trained, *sizes, inline(one.mixture["name"]) if one.mixture else "lost"])
    return table(["stage", "trained", ">steps", ">global batch", ">learning rate", "data"], rows)


def _data(stages: Sequence[_Trained]) -> Iterator[str]:
    for one in stages:
        if one.summary is not None:
            title = f"### {inline(one.name)}: {inline(one.summary['mixture'])}"
            yield from ("", title, "", *licences(one.summary))
