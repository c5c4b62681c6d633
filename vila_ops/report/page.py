"""The report of one run as one HTML page. Pure: numbers and texts are computed here, `page.html.jinja` is the layout.

Positions are in percent of the width or height of a drawing, which then fits any screen without scaling its text.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from markupsafe import Markup

from vila_ops.report.baselines import Published
from vila_ops.report.captions import FIRST
from vila_ops.report.drawing import Axis, Point, axis, polyline
from vila_ops.report.layers import draw
from vila_ops.report.panels import Panel, ReportRow, forest
from vila_ops.report.template import TEMPLATES, check_images, rendered
from vila_ops.report.words import number

Json = dict[str, Any]

OBJECTS = {
    "known": "objects that training data names, in a style that it does not have",
    "new": "objects that no training data names",
}
"""What the captions of a benchmark are of."""
MAX_POINTS = 400
"""Most points of a stage's line; a screen shows fewer. Local extremes are kept."""
SMOOTHING = 20
"""The span of the exponential mean is the stage's number of steps divided by this."""


@dataclass(frozen=True)
class MetricText:
    """Explanation of a metric for readers."""

    title: str
    what: str
    direction: str | None = None
    """Whether lower or higher is better; None: by the metric's `lower_is_better`."""


METRICS = {
    "caption_loss": MetricText("Caption loss", "Loss of the true caption, given the image."),
    "multiple_choice": MetricText(
        "Choice of caption",
        "Share of images whose true caption gains more likelihood from it than three others. Chance: one in four.",
    ),
    "multiple_choice_margin": MetricText(
        "Choice of caption: margin", "By how many nats the true caption gains more from its image than the others do."
    ),
    "cider": MetricText(
        "Caption CIDEr-D",
        "Generated captions compared with the true ones. Chance: the most frequent training caption for every image.",
    ),
    "held_out_pope_accuracy": MetricText(
        "Object questions: accuracy",
        "“Is there a … in the image?”; yes is right for half of the questions. Chance: always yes.",
    ),
    "held_out_pope_f1": MetricText("Object questions: F1", "F1 of the answer yes. Chance: always yes."),
    "held_out_pope_yes_ratio": MetricText(
        "Object questions: share of yes",
        "Share of questions that are answered with yes.",
        direction="Half of the right answers are yes, so 0.5 is unbiased.",
    ),
    "text_multiple_choice": MetricText(
        "Choice of a word’s meaning", "Choice among four meanings, text only. Chance: one in four."
    ),
    "alignment": MetricText(
        "Alignment in the language model",
        "Similarity of its states of an image and of its caption, averaged over the deeper half of its layers.",
        direction="Higher is more similar; the paper reports it for language models that are trained in pre-training.",
    ),
    "alignment_margin": MetricText(
        "Alignment: margin", "By how much a caption is more similar to the matched image than to the shuffled one."
    ),
    "new_names": MetricText(
        "New names",
        "Choice between two made-up names that only the prompt’s demonstrations give. Chance: one in two.",
    ),
    "new_names_margin": MetricText(
        "New names: margin", "By how many nats a name is likelier after an image of it than after one of the other."
    ),
    "text_loss": MetricText("Text loss", "Loss on held-out words with their meanings, text only."),
    "held_out_loss": MetricText("Held-out loss", "Loss of the answers, captions or texts of held-out records."),
    "answer_match": MetricText(
        "Equal answers",
        "Share of held-out questions whose first answer the model gives word for word. Chance: the most frequent one.",
    ),
}

GAPS = {
    "caption_loss": ("caption loss", "the true caption"),
    "held_out_loss": ("held-out loss", "held-out answers and texts"),
}
"""The losses that may show an effect of the image: the name of the loss, and what it is a loss of."""


def compile_templates() -> None:
    """Compile what `render` needs, which takes three times as long as `render` does then."""
    for name in ("page.html.jinja", "layout.html.jinja", "parts.html.jinja"):
        TEMPLATES.get_template(name)


def render(summary: Json, curves: Mapping[str, Sequence[Json]], images: Mapping[str, str]) -> str:
    """The page as HTML; it loads nothing and runs no script. `images` has those of the captions, by their items.

    Raises ValueError for an image that is not a data URL.
    """
    answer = summary["answer"]
    check_images([*images.values(), *([answer["image"]] if answer else [])])
    names = [stage["name"] for stage in summary["stages"]]
    return rendered(
        "page.html.jinja",
        summary=summary,
        verdict=verdict(summary),
        answered_by=answered_by(summary),
        chart=loss_chart({name: curves[name] for name in [*names, *curves] if name in curves}),
        cards=metric_cards(summary["metrics"], models=["base", *names]),
        layers=Markup(layers) if (layers := draw(summary["layers"])) else None,
        first=next((part for part in summary["captions"] if part["objects"]), None),
        num_first=FIRST,
        objects=OBJECTS,
        images=images,
        longest=max((task["seconds"] or 0 for task in summary["tasks"]), default=0),
    )


# Verdict


@dataclass(frozen=True)
class Headline:
    """The result for the final model."""

    tone: Literal["good", "bad", "open"]
    headline: str
    sentence: str
    panel: Panel | None
    """The gap that it is based on."""


def verdict(summary: Json) -> Headline:
    """Whether the interval of the final model's gap in loss excludes zero, and whether it was promoted."""
    gap = final_gap(summary)
    promoted = promotion(summary["mlflow"])
    if gap is None:
        sentence = f"The loss of the final model was not measured with shuffled images; {promoted}."
        return Headline("open", "Not compared with shuffled images", sentence, None)
    model, interval = gap["model"], f"{number(gap['low'])} to {number(gap['high'])}"
    measured = (
        f"on {gap['n']:,} images of the {gap['split']} split the gap is {number(gap['value'])} "
        f"{gap['unit']}, 95 % interval {interval}"
    )
    panel = forest([ReportRow(model, "model", gap)], zero=True)
    if gap["low"] <= 0 <= gap["high"]:
        sentence = f"Matched and shuffled images make no significant difference to {model}: {measured}"
        return Headline(
            "open", "No effect of the image is shown", f"{sentence}, which includes zero; {promoted}.", panel
        )
    better = gap["low"] > 0
    loss, predicted = GAPS[gap["measure"]]
    sentence = (
        f"{model} predicts {predicted} {'better' if better else 'worse'} with the matched image than with a "
        f"shuffled one: {measured}, which excludes zero; {promoted}."
    )
    headline = f"The image {'lowers' if better else 'raises'} the {loss}"
    return Headline("good" if better else "bad", headline, sentence, panel)


def final_gap(summary: Json) -> Json | None:
    """The last stage's gap in loss, the first of GAPS, that of the test split if there are several."""
    if not summary["stages"]:
        return None
    final = summary["stages"][-1]["name"]
    gaps = [
        metric
        for metric in summary["metrics"]
        if (metric["model"], metric["role"]) == (final, "gap")
        and metric["measure"] in GAPS
        and None not in (metric["value"], metric["low"], metric["high"])
    ]
    order = list(GAPS)
    return min(gaps, key=lambda metric: (order.index(metric["measure"]), metric["split"] != "test"), default=None)


def promotion(mlflow: Json) -> str:
    """Whether the model was registered and promoted, as a clause."""
    if mlflow["version"] is None:
        return "no model version was registered"
    result = "was promoted" if mlflow["promoted"] else "was registered and not promoted"
    return f"version {mlflow['version']} of {mlflow['model']} {result}"


def answered_by(summary: Json) -> str | None:
    """The stage whose checkpoint gave the answer, found by its digest."""
    if summary["answer"] is None:
        return None
    names = [stage["name"] for stage in summary["stages"] if stage["digest"] == summary["answer"]["model"]]
    return names[-1] if names else None


# Metrics


@dataclass(frozen=True)
class Card:
    """One metric on one split."""

    text: MetricText
    split: str | None
    """Of held-out data; None for official files."""
    suites: str
    unit: str
    values: Panel | None
    gaps: Panel | None
    direction: str
    sizes_differ: bool
    published: tuple[Published, ...]


def metric_cards(metrics: Sequence[Json], *, models: Sequence[str]) -> list[Card]:
    """A card for each metric and split, in the order of METRICS; other metrics follow in the order given."""
    known = list(METRICS)
    order = list(dict.fromkeys((metric["split"], metric["name"]) for metric in metrics))
    measures = {metric["name"]: metric["measure"] for metric in metrics}
    order.sort(key=lambda of: known.index(measures[of[1]]) if measures[of[1]] in METRICS else len(known))
    place = {name: index for index, name in enumerate(dict.fromkeys([*models, *(m["model"] for m in metrics)]))}
    ranked = sorted(metrics, key=lambda m: (order.index((m["split"], m["name"])), place[m["model"]]))
    return [_card(list(group)) for _, group in groupby(ranked, key=lambda m: (m["split"], m["name"]))]


def _card(group: list[Json]) -> Card:
    first = next((metric for metric in group if metric["role"] == "model"), group[0])
    text = METRICS.get(first["measure"], MetricText(first["name"].replace("_", " ").capitalize(), ""))
    gaps = [ReportRow(metric["model"], "model", metric) for metric in group if metric["role"] == "gap"]
    rows = list(_rows(group))
    suites = list(dict.fromkeys(metric["suite"] for metric in group))
    return Card(
        text=text,
        split=first["split"],
        suites=f"suite{'s' if len(suites) > 1 else ''} {' and '.join(suites)}",
        unit=first["unit"],
        values=forest(rows) if rows else None,
        gaps=forest(gaps, zero=True) if gaps else None,
        direction=text.direction or ("Lower is better." if first["lower_is_better"] else "Higher is better."),
        sizes_differ=len({metric["n"] for metric in group if metric["role"] == "model"}) > 1,
        published=tuple(Published.model_validate(one) for one in first["published"]),
    )


def _rows(group: list[Json]) -> Iterator[ReportRow]:
    """Each model followed by its control, then the chance level, once if it is the same for all models."""
    for metric in group:
        if metric["role"] == "model":
            yield ReportRow(metric["model"], "model", metric)
        elif metric["role"] == "control":
            yield ReportRow(f"{metric['model']}, shuffled", "control", metric)
    chances = [metric for metric in group if metric["role"] == "chance"]
    distinct = {tuple(metric[key] for key in ("value", "low", "high", "n")): metric for metric in chances}
    for metric in distinct.values():
        yield ReportRow("chance" if len(distinct) == 1 else f"chance for {metric['model']}", "chance", metric)


# Loss curves


@dataclass(frozen=True)
class StageCurve:
    """The part of the chart of one stage."""

    name: str
    steps: int
    left: float
    width: float
    raw: str
    smooth: str
    held_out: str
    """Lines as SVG points; both coordinates are in percent."""
    points: list[Point]
    validation: list[tuple[int, float]]
    """Step and validation loss."""


@dataclass(frozen=True)
class Chart:
    """All stages, one after another, on one loss axis."""

    axis: Axis
    stages: list[StageCurve]


def loss_chart(curves: Mapping[str, Sequence[Json]]) -> Chart | None:
    """The chart of all stages; None without a loss."""
    curves = {name: rows for name, rows in curves.items() if rows}
    losses = [row[key] for rows in curves.values() for row in rows for key in ("loss", "validation_loss") if key in row]
    if not losses:
        return None
    scale = axis(losses, ticks=5, lowest=98, highest=12)
    shares = widths([max(1, rows[-1]["step"]) for rows in curves.values()])
    lefts = [sum(shares[:index]) for index in range(len(shares))]
    parts = zip(curves.items(), lefts, shares, strict=True)
    return Chart(scale, [_stage_curve(name, rows, scale, left=x, width=width) for (name, rows), x, width in parts])


def widths(steps: Sequence[int], *, least: float = 20) -> list[float]:
    """Width of each stage in percent: proportional to its steps, but wide enough to be read."""
    total = sum(steps)
    raw = [max(100 * step / total, min(least, 100 / len(steps))) for step in steps]
    return [100 * share / sum(raw) for share in raw]


def _stage_curve(name: str, rows: Sequence[Json], scale: Axis, *, left: float, width: float) -> StageCurve:
    steps = max(1, rows[-1]["step"])

    def placed(points: Iterable[tuple[int, float]]) -> list[Point]:
        return [(round(left + width * step / steps, 2), scale.at(loss)) for step, loss in points]

    train = finite(rows, "loss")
    held_out = finite(rows, "validation_loss")
    return StageCurve(
        name=name,
        steps=steps,
        left=left,
        width=width,
        raw=polyline(placed(thin(train))),
        smooth=polyline(placed(thin(smoothed(train)))),
        held_out=polyline(placed(held_out)),
        points=placed(held_out),
        validation=held_out,
    )


def finite(rows: Sequence[Json], key: str) -> list[tuple[int, float]]:
    """Step and value of the rows with a finite value."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The exponential mean, without the bias of its start."""
    keep = 1 - 2 / (max(3, len(points) // SMOOTHING) + 1)
    total = weight = 0.0
    out = []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        out.append((step, total / weight))
    return out


def thin(points: list[tuple[int, float]], *, limit: int = MAX_POINTS) -> list[tuple[int, float]]:
    """At most about `limit` points: the lowest and the highest of each group of neighbours, and both ends."""
    if len(points) <= limit:
        return points
    size = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        run = range(start, min(start + size, len(points)))
        kept |= {min(run, key=lambda i: points[i][1]), max(run, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]
