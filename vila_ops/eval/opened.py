"""The benchmarks of a sealed report with their items, rows and scores, from the store alone: no recipe, no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from vila_ops.artifacts import store
from vila_ops.artifacts.kinds import (
    Artifact,
    BenchmarkFiles,
    BenchmarkResult,
    Checkpoint,
    Dataset,
    EvalReport,
    Pretrained,
)
from vila_ops.artifacts.listing import of_digest
from vila_ops.config.benchmarks import OfficialBenchmark
from vila_ops.config.eval import Benchmark
from vila_ops.data.records import Image
from vila_ops.eval.benchmark import Item, MetricValues, SealedImage, benchmark_of
from vila_ops.eval.benchmarks.held_out.items import EvalInputs, HeldOut, ImageItem, SampleItem
from vila_ops.eval.compare import ScoreTable
from vila_ops.eval.report import name_in_suite, read_items, read_report, result_of
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.scoring import metric_values
from vila_ops.eval.sealed import SealedImages, items_of
from vila_ops.generate.load import tokenizer_of

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

CONFIG: TypeAdapter[Any] = TypeAdapter(Benchmark)


@dataclass(frozen=True)
class OpenedBenchmark:
    """One benchmark of a report."""

    name: str
    """The suite's name of it."""
    config: Any
    """Its config, of the class of its kind."""
    inputs: Mapping[str, Any]
    """The other settings that its numbers depend on."""
    items: Sequence[Item]
    rows: tuple[ItemRow, ...]
    files: BenchmarkFiles | None
    """None: its items are of held-out data."""

    def values(self) -> list[MetricValues]:
        """The values of the model's own metrics, under the names that the report has. Layers are left out."""
        own = [one for one in metric_values(self.items, self.rows, self.config) if one.role == "model"]
        return [
            replace(one, name=name_in_suite(one.name, self.config.kind, self.name)) for one in own if one.layer is None
        ]

    def scores(self) -> dict[str, ScoreTable]:
        """The values of each metric as a comparison reads them."""
        references = {row.item: row.reference_hash for row in self.rows}
        return {
            one.name: ScoreTable(
                items=one.units.names,
                groups=one.units.groups,
                slices=one.units.slices or ((),) * len(one.units.names),
                values=one.values,
                statistic=one.statistic,
                lower_is_better=one.lower_is_better,
                unit=one.unit,
                references=references,
            )
            for one in self.values()
        }

    def images_of(self, item: Item) -> list[bytes]:
        """The files of an item's images, in their order; without those that are missing."""
        if isinstance(item, ImageItem):
            return [item.image]
        if isinstance(item, SampleItem):
            return list(item.images)
        images = []
        for part in (part for parts in item.parts.values() for part in parts):
            if isinstance(part, Image):
                images.append(part.data)
            elif isinstance(part, SealedImage):
                images.append(self._sealed_images(part))
        return images

    @cached_property
    def _sealed_images(self) -> SealedImages:
        assert self.files is not None
        return SealedImages(self.files)


def opened(report: EvalReport, *, metrics: Sequence[str] = ()) -> dict[str, OpenedBenchmark]:
    """The benchmarks of a report by the suite's names; those that may have one of the metrics, or all.

    Raises what `open_benchmark` does.
    """
    names = read_report(report).benchmarks
    if metrics:
        names = {name: names[name] for name in names if any(f"{one}_".startswith(f"{name}_") for one in metrics)}
    return {name: open_benchmark(report, name) for name in names}


def open_benchmark(report: EvalReport, name: str) -> OpenedBenchmark:
    """A benchmark of a report, by the suite's name of it.

    Raises CorruptArtifact, and ValueError for what another version of vila-ops scored or for items that are not there.
    """
    root = store.store_of(report.uri)
    result = result_of(read_report(report).benchmarks[name], store=root)
    manifest = store.manifest_of(result)
    recipe, (model, source, *_) = manifest["recipe"], manifest["parents"]
    config = _config(manifest, f"{name} of {report.uri}")
    files = None
    items: Sequence[Item]
    if isinstance(config, OfficialBenchmark):
        files = _needed(BenchmarkFiles, source, root=root, name=name)
        items = items_of(files, first=config.first)
    else:
        inputs = EvalInputs(data=_needed(Dataset, source, root=root, name=name), **recipe["inputs"])
        items = tuple(benchmark_of(config.kind).read(HeldOut(inputs, partial(_tokenizer, model, root)), config))
    return OpenedBenchmark(name, config, recipe["inputs"], items, read_items(result), files)


def _config(manifest: Mapping[str, Any], what: str) -> Any:
    """The config of a result's benchmark. Raises ValueError where this version would score the answers otherwise."""
    recipe = manifest["recipe"]
    try:
        config = CONFIG.validate_python(recipe["benchmark"])
    except ValidationError as error:
        raise _other_version(what) from error
    revision, parents = benchmark_of(config.kind).REVISION, tuple(manifest["parents"])
    at = store.address(BenchmarkResult, revision=revision, recipe=recipe, parents=parents)
    if manifest["address"] != f"{at.kind}/{at.key}":
        raise _other_version(what)
    return config


def _other_version(what: str) -> ValueError:
    return ValueError(f"{what} was scored by another version of vila-ops; evaluate the model again (answers are kept)")


def _needed(kind: type[Artifact], digest: str, *, root: str, name: str) -> Any:
    artifact = of_digest(kind, digest, store=root)
    if artifact is None:
        raise ValueError(
            f"{root} has no {store.KINDS[kind]} of digest {digest[:12]}, of which the items of {name!r} are read; "
            "evaluate the model again, or name the store that it was evaluated in"
        )
    return artifact


def _tokenizer(model: str, root: str) -> "Tokenizer":
    """The tokenizer of the model with this digest."""
    kinds: tuple[type[Checkpoint | Pretrained], ...] = (Checkpoint, Pretrained)
    sealed = next((one for kind in kinds if (one := of_digest(kind, model, store=root)) is not None), None)
    if sealed is None:
        raise ValueError(f"{root} has no model of digest {model[:12]}, whose tokenizer reads the items; keep it there")
    return tokenizer_of(sealed)
