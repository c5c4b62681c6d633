"""What a recipe took and what was gained by it, of a store where every task took half an hour of one GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.sealed import ROOT, held_out_of, seal_all, seal_report, tiny_run
from vila_ops.artifacts.attempts import attempt
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.listing import sealed
from vila_ops.artifacts.store import address, seal
from vila_ops.config import Resources, Run
from vila_ops.pipeline.cost import TaskCost, cost_of
from vila_ops.pipeline.explain import explain
from vila_ops.registry import alias_register
from vila_ops.report import cost, gains

GPU = "cuda:0, NVIDIA H100 80GB HBM3, CUDA 13.0"


@pytest.fixture
def tiny(make_resources: Callable[..., Resources], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """With a registry, of which nothing is asked, at 4 an hour."""
    monkeypatch.chdir(ROOT)
    accelerator = {"name": "H100", "memory_gib": 80, "peak_tflops": 989, "price_per_hour": 4.0}
    more = {"tracking.uri": "http://127.0.0.1:9", "train.accelerator": accelerator}
    return tiny_run(make_resources(tmp_path).with_changes(more))


def stage_that_took(run: Run, number: int, workers: list[dict[str, Any]]) -> TaskCost:
    """The cost of a stage with facts of its workers; it took an hour."""
    stage = {"global_batch_size": 2, "sequence_length": 128}
    at = address(Checkpoint, revision=1, recipe={"stage": stage, "number": number}, parents=())
    with attempt(at, store=run.resources.storage.store) as folder:
        (folder / "model").write_bytes(b"m")
    execution = {"seconds": 3600.0, "sealed": "2026", "workers": workers}
    done = seal(Checkpoint, at, folder, facts={"stage": "sft", "step": 6}, execution=execution)
    return cost_of("train", f"sft {number}", done.uri, run.resources)


def test_the_energy_of_a_stage_is_that_of_its_gpus_and_of_each_machine_once(tiny: Run) -> None:
    """Three workers on two machines: 1 Wh of each GPU; 5 Wh of one machine by the longer count, 3 Wh of the other."""
    facts = [("a", 5), ("a", 4.5), ("b", 3)]
    workers = [
        {"rank": rank, "device": GPU, "node": node, "gpu_joules": 3600.0, "cpu_joules": 3600.0 * watts}
        for rank, (node, watts) in enumerate(facts)
    ]
    read = stage_that_took(tiny, 1, workers)
    assert (read.gpu_joules, read.cpu_joules) == (3 * 3600.0, 8 * 3600.0)
    unread = stage_that_took(tiny, 2, [*workers[:2], {"rank": 2, "device": GPU, "node": "b"}])
    assert (unread.gpu_joules, unread.cpu_joules) == (None, None)
    on_cpu = stage_that_took(tiny, 3, [{"rank": 0, "device": "cpu", "cpu_joules": 1800.0}])
    first, second, third, total = cost.table([read, unread, on_cpu])
    assert (first["GPU Wh"], first["CPU Wh"]) == (3.0, 8.0)
    assert (second["GPU Wh"], second["CPU Wh"]) == ("not readable", "not readable")
    assert (third["GPU Wh"], third["CPU Wh"]) == ("", 0.5)
    assert (total["GPU Wh"], total["CPU Wh"]) == ("not readable", "not readable")
    *_, total = cost.table([read, on_cpu])
    assert (total["GPU Wh"], total["CPU Wh"]) == (3.0, 8.5)


def test_a_point_costs_what_the_training_between_two_reports_took(tiny: Run) -> None:
    """text_loss 3.0, 2.5, 2.6, 2.2: 50 points for half an hour and 2 of money, 10 lost, and 40 gained."""
    seal_all(tiny)
    stages = gains.gains_of(tiny, explain(tiny))
    assert [(one.model, one.over) for one in stages] == [
        ("align on tiny_probe", "base on tiny_probe"),
        ("pretrain on tiny_probe", "align on tiny_probe"),
        ("sft on tiny_probe", "pretrain on tiny_probe"),
    ]
    assert [one.points for one in stages] == pytest.approx([50, -10, 40])
    rows = gains.table(stages)
    assert [row["hours a point"] for row in rows] == ["0.01", "", "0.0125"]
    assert [row["GPU-hours a point"] for row in rows] == ["0.01", "", "0.0125"]
    assert [row["money a point"] for row in rows] == ["0.04", "", "0.05"]


def test_the_model_is_compared_with_the_champion_by_the_stages_that_are_its_own(tiny: Run) -> None:
    """The champion is this recipe's model after align: pretrain and sft, an hour and 4 of money, brought 30 points."""
    seal_all(tiny)
    name, place = tiny.recipe.gate.model_name, tiny.resources.storage.store
    model = next(one for one in sealed(Checkpoint, store=place) if one.stage == "align")
    version = ModelVersion(name=name, version=4, checkpoint=model, promoted=True)
    alias_register.move(name, {"champion": version}, over=None, reason="a test", store=place)
    assert len(gains.gains_of(tiny, explain(tiny))) == 3, "the champion was not measured on the final suite"
    seal_report(tiny, tiny.recipe.final_suite, "align", model, held_out_of(tiny))
    *_, last = gains.gains_of(tiny, explain(tiny))
    assert (last.model, last.over) == ("sft on tiny", "champion 4 on tiny")
    assert last.points == pytest.approx(30)
    assert (last.hours, last.gpu_hours, last.money) == (1.0, 1.0, 4.0)
    (row,) = gains.table([last])
    assert (row["hours a point"], row["money a point"]) == ("0.0333", "0.133")


def test_what_is_not_sealed_yet_is_left_out(tiny: Run) -> None:
    assert gains.gains_of(tiny, explain(tiny)) == []
