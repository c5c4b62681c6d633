"""What a point of each metric of the gate took: gained by a stage, and by the last model over the champion."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from vila_ops.artifacts.kinds import Checkpoint, EvalReport
from vila_ops.artifacts.listing import of_digest
from vila_ops.artifacts.store import read_manifest, reference
from vila_ops.config import Config, Run
from vila_ops.eval.report import Report, ReportMetric, read_report
from vila_ops.pipeline.cost import TaskCost, cost_of
from vila_ops.pipeline.explain import Step
from vila_ops.registry import alias_register
from vila_ops.registry.aliases import CHAMPION

Json = dict[str, Any]
IN_POINTS = "points"
"""The unit of metrics that count points themselves."""
POINT = 0.01
"""A point of any other metric."""


class Gain(Config):
    """How a metric of the gate differs between the reports of two models, and what the training between them took."""

    metric: str
    model: str
    over: str
    points: float
    """Above zero where the model is better."""
    hours: float
    gpu_hours: float
    money: float | None
    """None without a price."""

    def per_point(self, amount: float | None) -> float | None:
        """An amount for each point; None where nothing was gained, or the amount is not known."""
        return amount / self.points if amount is not None and self.points > 0 else None


def gains_of(run: Run, steps: Sequence[Step]) -> list[Gain]:
    """Each stage over the model before it on the stage suite, and the last one over the champion on the final suite.

    `steps` are those of `explain`; pairs of which a report or a stage is not sealed are left out, and a champion that
    comes from all of these stages.
    """
    trained = [step for step in steps if step.task == "train"]
    measured = [step for step in steps if step.task == "evaluate"]
    by_stage, (last, *rivals) = measured[: len(trained) + 1], measured[len(trained) + 1 :]
    pairs = [(*models, [stage]) for models, stage in zip(pairwise(by_stage), trained, strict=True)]
    pairs += [(rival, last, own) for rival in rivals if (own := _without_those_of_the_champion(run, trained))]
    gains: list[Gain] = []
    for over, model, stages in pairs:
        if all(step.uri is not None for step in (over, model, *stages)):
            gains += _gains(run, over, model, [cost_of(s.task, s.name, str(s.uri), run.resources) for s in stages])
    return gains


def table(gains: Sequence[Gain]) -> list[Json]:
    """Rows for people."""
    return [
        {
            "gain": f"{one.metric}: {one.model} over {one.over}",
            "points": round(one.points, 2),
            "hours a point": _shown(one.per_point(one.hours)),
            "GPU-hours a point": _shown(one.per_point(one.gpu_hours or None)),
            "money a point": _shown(one.per_point(one.money)),
        }
        for one in gains
    ]


def _shown(amount: float | None) -> str:
    return "" if amount is None else f"{amount:.3g}"


def _gains(run: Run, over: Step, model: Step, spent: Sequence[TaskCost]) -> Iterator[Gain]:
    before, after = _metrics(over), _metrics(model)
    prices = [one.money for one in spent if one.money is not None]
    for name in dict.fromkeys(rule.metric for rule in run.recipe.gate.rules):
        if name in before and name in after:
            now, difference = after[name], after[name].value - before[name].value
            yield Gain(
                metric=name,
                model=model.name,
                over=over.name,
                points=(-difference if now.lower_is_better else difference) / (1 if now.unit == IN_POINTS else POINT),
                hours=sum(one.seconds for one in spent) / 3600,
                gpu_hours=sum(one.gpu_hours for one in spent),
                money=sum(prices) if prices else None,
            )


def _metrics(step: Step) -> dict[str, ReportMetric]:
    """The model's own, by name."""
    uri = str(step.uri)
    report: Report = read_report(reference(EvalReport, uri, read_manifest(uri)))
    return {metric.name: metric for metric in report.metrics if metric.role == "model"}


def _without_those_of_the_champion(run: Run, trained: Sequence[Step]) -> list[Step]:
    """The stages that the champion does not come from, too."""
    name, store = run.recipe.gate.model_name, run.resources.storage.store
    rival, shared = alias_register.read(name, store=store).model_version(name, CHAMPION), set()
    model = rival.checkpoint if rival else None
    while model is not None:
        shared.add(model.digest)
        model = of_digest(Checkpoint, model.parents[1], store=store)  # None for the untrained one
    return [step for step in trained if step.uri is None or read_manifest(step.uri)["digest"] not in shared]
