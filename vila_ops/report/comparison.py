"""The page of a comparison: differences with intervals, slices, and the items on which the models disagree.

`render` is a pure function of the comparison and of the images of its items.
"""

import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vila_ops.data.shards import data_url
from vila_ops.eval.compare import MetricComparison
from vila_ops.eval.compare_reports import ItemDisagreement, ReportComparison
from vila_ops.eval.shown import thumbnail
from vila_ops.report.drawing import Axis, axis
from vila_ops.report.gallery import IMAGE_BYTES, SIDE, tail
from vila_ops.report.template import check_images, rendered

ItemImages = Mapping[tuple[str, str], Sequence[str]]
"""The images of items as data URLs, by benchmark and item."""
CARDS = 12
"""Items of a benchmark and a candidate on the page."""


@dataclass(frozen=True)
class DifferencePanel:
    """Rows of one candidate and one unit on one axis."""

    candidate: str
    unit: str
    axis: Axis
    rows: tuple[MetricComparison, ...]
    zero: float
    """Position of zero in percent."""


@dataclass(frozen=True)
class DisagreementCard:
    """An item that two models score differently."""

    item: str
    benchmark: str
    model: str
    metrics: tuple[str, ...]
    """The metrics by which they disagree."""
    question: str
    images: tuple[str, ...]
    expected: str
    sides: tuple[tuple[str, str | None, str], ...]
    """(model, answer, scores) of the baseline and of the candidate."""


def images_of(compared: ReportComparison) -> dict[tuple[str, str], list[str]]:
    """The images of the items that the page shows, small and bounded in bytes. Raises CorruptArtifact."""
    from vila_ops.eval.opened import open_benchmark  # heavy: transformers

    shown: dict[str, list[str]] = {}
    for card in _cards(compared, {}):
        shown.setdefault(card.benchmark, []).append(card.item)
    images: dict[tuple[str, str], list[str]] = {}
    left = IMAGE_BYTES
    for benchmark, names in shown.items():
        opened = open_benchmark(compared.models[0].report, benchmark)
        for item in [one for one in opened.items if one.id in names]:
            small = [thumbnail([data], SIDE) for data in opened.images_of(item)]
            urls = [data_url(one) for one in small if one is not None]
            left -= sum(map(len, urls))
            if left >= 0:
                images[benchmark, item.id] = urls
    return images


def render(compared: ReportComparison, images: ItemImages) -> str:
    """The page as HTML; it loads nothing and runs no script. Raises ValueError for an image that is not a data URL."""
    check_images(url for urls in images.values() for url in urls)
    metrics = compared.comparison.metrics
    return rendered(
        "comparison.html.jinja",
        compared=compared,
        letters=(letters := _letters(compared)),
        candidates=[letters[name] for name in compared.comparison.candidates],
        names={one.name: "/".join(one.name.split("/")[-2:]) for one in compared.models},
        notes=[_lettered(note, compared) for note in compared.notes],
        panels=_panels(metrics),
        verdicts=Counter(one.verdict for one in metrics),
        slices=[one for one in metrics if one.slices or one.skipped_slices],
        cards=list(_cards(compared, images)),
    )


def _letters(compared: ReportComparison) -> dict[str, str]:
    """A letter for each model by its name, as the command prints them: names may be paths of a machine."""
    return dict(zip((one.name for one in compared.models), string.ascii_uppercase, strict=False))


def _lettered(text: str, compared: ReportComparison) -> str:
    """A text with letters in place of the models' names."""
    for name, letter in sorted(_letters(compared).items(), key=lambda pair: -len(pair[0])):
        text = text.replace(name, letter)
    return text


def _panels(metrics: Sequence[MetricComparison]) -> list[DifferencePanel]:
    groups: dict[tuple[str, str], list[MetricComparison]] = {}
    for one in metrics:
        groups.setdefault((one.candidate, one.unit), []).append(one)
    panels = []
    for (candidate, unit), group in groups.items():
        scale = axis([0.0, *(end for one in group for end in (one.overall.low, one.overall.high))], ticks=4)
        panels.append(DifferencePanel(candidate, unit, scale, tuple(group), scale.at(0.0)))
    return panels


def _cards(compared: ReportComparison, images: ItemImages) -> Iterator[DisagreementCard]:
    """Each item once for a candidate, with all metrics by which it differs."""
    items: dict[tuple[str, str, str], list[ItemDisagreement]] = {}
    for one in compared.disagreements:
        items.setdefault((one.benchmark, one.model, one.item), []).append(one)
    number: dict[tuple[str, str], int] = {}
    for (benchmark, model, item), differing in items.items():
        number[benchmark, model] = number.get((benchmark, model), 0) + 1
        if number[benchmark, model] <= CARDS:
            first = differing[0]
            yield DisagreementCard(
                item=item,
                benchmark=benchmark,
                model=model,
                metrics=tuple(one.metric for one in differing),
                question=tail(first.question),
                images=tuple(images.get((benchmark, item), ())),
                expected=tail(first.expected),
                sides=(
                    (compared.comparison.baseline, _answer(first.baseline_answer), _scores(first.baseline)),
                    (model, _answer(first.candidate_answer), _scores(first.candidate)),
                ),
            )


def _answer(answer: str | None) -> str | None:
    return None if answer is None else tail(answer)


def _scores(scores: Sequence[float]) -> str:
    return " ".join(f"{score:g}" for score in scores)
