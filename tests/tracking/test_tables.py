"""Tables of a run, in MLflow's own form."""

import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from tests.tracking.live import begin
from vila_ops import tracking
from vila_ops.config import Resources
from vila_ops.tracking import MetricLog
from vila_ops.tracking.tables import LoggedTable, log_tables


def test_tables_are_as_mlflow_s_own_and_a_second_sending_doubles_no_row(resources: Resources) -> None:
    client, run_id, other = MlflowClient(resources.tracking.uri), begin(resources), begin(resources)
    columns, rows = ("item", "answer", "score"), (("a", 'ä dog, "big"', 0.5), ("b", None, 1.0))
    for _ in range(2):
        with MetricLog(resources, run_id) as metrics:
            log_tables(metrics, {"items/pope.json": LoggedTable(columns, rows)})
    client.log_table(other, {name: [row[at] for row in rows] for at, name in enumerate(columns)}, "items/pope.json")
    assert read_table(resources, run_id, "items/pope.json") == read_table(resources, other, "items/pope.json")
    tags = [client.get_run(one).data.tags["mlflow.loggedArtifacts"] for one in (run_id, other)]
    assert tags[0] == tags[1]


def read_table(resources: Resources, run_id: str, path: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(
        Path(MlflowClient(resources.tracking.uri).download_artifacts(run_id, path)).read_text()
    )
    return table


def test_an_image_of_a_table_is_a_file_that_the_table_names(resources: Resources) -> None:
    client, run_id = MlflowClient(resources.tracking.uri), begin(resources)
    images = (b"\xff\xd8 1", b"\xff\xd8 2")
    with MetricLog(resources, run_id) as metrics:
        log_tables(metrics, {"images/pope.json": LoggedTable(("image",), tuple((image,) for image in images))})
    table = read_table(resources, run_id, "images/pope.json")
    for (cell,), image in zip(table["data"], images, strict=True):
        assert cell["type"] == "image"  # and the keys that `log_table` writes
        for key in ("filepath", "compressed_filepath"):
            assert Path(client.download_artifacts(run_id, cell[key])).read_bytes() == image


def test_a_table_that_was_kept_while_the_server_was_away_arrives(resources: Resources, away: Resources) -> None:
    run_id = begin(resources)
    with MetricLog(away, run_id) as metrics:
        log_tables(metrics, {"items/pope.json": LoggedTable(("item",), (("a",),))})
    tracking.end_run(resources, begin(resources), "FINISHED")
    client = MlflowClient(resources.tracking.uri)
    assert [file.path for file in client.list_artifacts(run_id, "items")] == ["items/pope.json"]
    assert "items/pope.json" in client.get_run(run_id).data.tags["mlflow.loggedArtifacts"]
