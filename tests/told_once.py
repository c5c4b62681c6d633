"""What MLflow has to have of a stage that was trained to its end, whatever happened meanwhile."""

from collections import Counter
from typing import Any

from mlflow import MlflowClient

from vila_ops import tracking


def check_told_once(uri: str, address: str, curve: list[dict[str, Any]]) -> None:
    """Check that MLflow has one run of a stage, by the key of its address: finished, with each loss of the curve.

    No metric is told twice of a step.
    """
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.address = '{address}'")
    assert run.info.status == "FINISHED"
    told = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    for name in ("loss", "validation_loss"):
        points = sorted((one.step, one.value) for one in told[name])
        assert points == [(row["step"], row[name]) for row in curve if name in row and row["step"]]
    for name, history in told.items():
        if not name.startswith("system/"):  # the load of the machine is read more than once in a step
            assert max(Counter(one.step for one in history).values()) == 1, name
