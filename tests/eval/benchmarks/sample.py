"""Items of a benchmark's committed sample, and rows of given answers."""

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from vila_ops.config.benchmarks import OfficialBenchmark
from vila_ops.config.eval import MeasureSettings
from vila_ops.eval.benchmark import Item, benchmark_of
from vila_ops.eval.rows import ItemRow, Response
from vila_ops.eval.runner import row_of
from vila_ops.eval.scoring import score

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "docs/samples"
SETTINGS = MeasureSettings(bootstrap_resamples=20)


def config_of(kind: type[OfficialBenchmark], **changes: Any) -> Any:
    """The config of a benchmark as configs/benchmarks has it, with some settings changed."""
    settings = yaml.safe_load((ROOT / f"configs/benchmarks/{kind.model_fields['kind'].default}.yaml").read_text())
    return kind.model_validate({**settings, **changes})


def sample_items(config: Any) -> list[Item]:
    """The items of a benchmark's sample."""
    return list(benchmark_of(config.kind).read(SAMPLES / config.kind, config))


def rows_of(items: list[Item], config: Any, answer: Callable[[Item, int], str | None]) -> list[ItemRow]:
    """The rows of answers by item and rotation; None is a request that timed out."""

    def no_tokenizer() -> Any:
        raise AssertionError("official benchmarks are written without a tokenizer")

    by_id = {item.id: item for item in items}
    rows = []
    for request in benchmark_of(config.kind).requests(items, config, no_tokenizer):
        text = answer(by_id[request.item], request.rotation)
        response = Response(status="timeout") if text is None else Response(answer=text, finish_reason="stop")
        rows.append(row_of(by_id[request.item], request, response))
    return rows


def numbers(rows: list[ItemRow], items: list[Item], config: Any) -> dict[str, float]:
    """The value of each metric by its name."""
    return {metric.name: metric.value for metric in score(items, rows, config, SETTINGS).measurement.metrics}


def slices(rows: list[ItemRow], items: list[Item], config: Any) -> dict[tuple[str, str], float]:
    """The value of each metric on each slice by both names."""
    return {(one.name, one.slice): one.value for one in score(items, rows, config, SETTINGS).measurement.slices}


def copy_of(kind: str, folder: Path) -> Path:
    """A copy of a benchmark's sample, to be broken."""
    return Path(shutil.copytree(SAMPLES / kind, folder / kind))


def cells(workbook: bytes) -> list[list[str]]:
    """The texts of a workbook's rows, by the standard library's readers."""
    with zipfile.ZipFile(io.BytesIO(workbook)) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    main = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    return [["".join(cell.itertext()) for cell in row.iter(f"{main}c")] for row in sheet.iter(f"{main}row")]
