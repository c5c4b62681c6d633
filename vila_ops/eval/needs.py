"""Whether held-out data has enough for the benchmarks of a suite; reads the index alone."""

from typing import Any

import pyarrow.parquet as pq

from vila_ops.artifacts.kinds import Dataset
from vila_ops.artifacts.store import file
from vila_ops.config import Config, Suite
from vila_ops.config.eval import BenchmarkConfig
from vila_ops.data.shards import INDEX
from vila_ops.eval.benchmarks.held_out.items import captions_of, known_objects


def check_held_out(suite: Suite, data: Dataset) -> None:
    """Raise ValueError, with every benchmark that lacks held-out objects, what it needs, and the way out."""
    columns = ["source", "split", "object", "num_images"]
    splits = [suite.split, *(["train"] if suite.kept_out else [])]
    every = pq.read_table(file(data, INDEX), columns=columns, filters=[("split", "in", splits)]).to_pylist()
    rows = [row for row in every if row["split"] == suite.split and row["source"] not in suite.kept_out]
    renders = {name: source.render for name, source in suite.mixture.sources.items()}
    few = []
    benchmarks: dict[str, Config] = dict(suite.benchmarks)
    for name, benchmark in benchmarks.items():
        if not isinstance(benchmark, BenchmarkConfig):
            continue  # a plugin's, which checks its own items
        objects = {
            row["object"]
            for row in (_of_known_objects(suite, every) if benchmark.of_known_objects() else rows)
            if renders.get(row["source"]) in benchmark.reads() and (row["num_images"] or not benchmark.needs_images())
        }
        if len(objects) < benchmark.least_objects():
            images = " with images" if benchmark.needs_images() else ""
            few.append(f"{name} needs {benchmark.least_objects()} objects{images} and has {len(objects)}")
            if images and any(renders.get(row["source"]) in benchmark.reads() for row in rows) and not objects:
                few[-1] += " (control: none reads records without images)"
    if few:
        raise ValueError(
            f"suite {suite.name!r} has too few held-out records in the {suite.split} split of mixture "
            f"{suite.mixture.name!r}: {'; '.join(few)}; raise split.{suite.split} of the mixtures of all stages and "
            f"suites alike, add records, or leave these benchmarks out"
        )


def _of_known_objects(suite: Suite, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = known_objects(rows, captions_of(suite), split=suite.split)
    return [row for row in rows if row["source"] in suite.kept_out and row["object"] in known]
