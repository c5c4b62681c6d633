"""A comparison of reports as tables for a terminal."""

import string
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from vila_ops.cli.tables import WIDTH, Row, table
from vila_ops.eval.compare import Difference, MetricComparison
from vila_ops.eval.compare_reports import ItemDisagreement, ReportComparison

_NUMBERS = ("value", "A", "difference", "95 % interval")
_HEADER = ("metric", *_NUMBERS, "is", "p (Holm)", "p", "detects", "differ", "items", "groups")
_LEGEND = (
    "is: better or worse than A where p (Holm) is at most 5 %, equal where every item is, else open. p (Holm): "
    "adjusted for all metrics; p: for this metric alone. detects: the true difference that is found in 80 % of the "
    "cases. differ: items that are scored differently. groups: images, or other items that belong together."
)
_TEXT = 300
"""Characters of a text of a disagreement."""


def lines(compared: ReportComparison, *, slices: bool, disagreements: int) -> list[str]:
    """The models, what is not compared, the table of metrics, and on request slices and disagreements."""
    letters = dict(zip((one.name for one in compared.models), string.ascii_uppercase, strict=False))
    metrics = compared.comparison.metrics
    parts = [
        [*_models(compared, letters)],
        [*_left_out(compared, letters), *(line for note in compared.notes for line in _wrapped(f"note: {note}"))],
        table([_HEADER, *_rows(metrics, letters)]),
        _wrapped(_LEGEND),
    ]
    if slices:
        parts += [_slices(one, letters) for one in metrics]
    if disagreements:
        parts += [list(_items(one, letters)) for one in _first(compared.disagreements, disagreements)]
    return [line for number, part in enumerate(parts) if part for line in ([""] if number else []) + part]


def _models(compared: ReportComparison, letters: Mapping[str, str]) -> Iterator[str]:
    for one in compared.models:
        split = f", {one.split} split" if one.split else ""
        yield f"{letters[one.name]}  {one.name}"
        yield f"   suite {one.report.suite}{split}, model {one.report.model[:12]}"


def _left_out(compared: ReportComparison, letters: Mapping[str, str]) -> list[str]:
    """What is not compared, metrics with the same reason on one line."""
    metrics: dict[tuple[str, str, str], list[str]] = {}
    for one in compared.comparison.left_out:
        metrics.setdefault((one.benchmark, letters[one.candidate], one.reason), []).append(one.metric or one.benchmark)
    return [
        line
        for (_, letter, reason), names in metrics.items()
        for line in _wrapped(f"not compared: {', '.join(names)} of {letter}: {reason}")
    ]


def _rows(metrics: Sequence[MetricComparison], letters: Mapping[str, str]) -> Iterator[Row]:
    """A row for each metric; those of one benchmark stand below its name, without it."""
    for benchmark, several in groupby(metrics, key=lambda one: one.benchmark):
        own = list(several)
        if {one.metric for one in own} != {benchmark}:
            yield (benchmark, *[""] * (len(_HEADER) - 1))
        for one in own:
            short = one.metric.removeprefix(f"{benchmark}_")
            shown = benchmark if one.metric == benchmark else f"  {short}"
            yield _row(one, _name(shown, one.candidate, letters))


def _row(one: MetricComparison, name: str) -> Row:
    overall = one.overall
    return (
        name,
        *_numbers(overall),
        one.verdict,
        f"{one.p_holm:.3f}",
        f"{one.p:.3f}",
        f"{one.detectable:.3f}",
        f"{one.disagreements:,}",
        f"{overall.n:,}",
        f"{overall.groups:,}",
    )


def _name(metric: str, candidate: str, letters: Mapping[str, str]) -> str:
    """The metric, with the candidate's letter where there are several."""
    return metric if len(letters) == 2 else f"{metric} {letters[candidate]}"


def _numbers(one: Difference) -> tuple[str, str, str, str]:
    return f"{one.candidate:.3f}", f"{one.baseline:.3f}", f"{one.value:+.3f}", f"[{one.low:+.3f}, {one.high:+.3f}]"


def _slices(one: MetricComparison, letters: Mapping[str, str]) -> list[str]:
    """The table of a metric's slices, and why some are not in it."""
    metric = _name(one.metric, one.candidate, letters)
    rows = [(name, *_numbers(slice_), f"{slice_.n:,}") for name, slice_ in one.slices.items()]
    told = table([(metric, *_NUMBERS, "items"), *rows]) if rows else []
    for name, reason in one.skipped_slices.items():
        told += _wrapped(f"not compared: slice {name} of {metric}: {reason}")
    return told


def _first(shown: Sequence[ItemDisagreement], count: int) -> Iterator[ItemDisagreement]:
    """The first ones of each metric and candidate."""
    seen: dict[tuple[str, str], int] = {}
    for one in shown:
        key = one.metric, one.model
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= count:
            yield one


def _items(one: ItemDisagreement, letters: Mapping[str, str]) -> Iterator[str]:
    yield f"{_name(one.metric, one.model, letters)}, item {one.item}"
    for name, text in (("asked", one.question), ("expected", one.expected)):
        if text:
            yield f"   {name}: {_short(text)}"
    for letter, answer, scores in (
        ("A", one.baseline_answer, one.baseline),
        (letters[one.model], one.candidate_answer, one.candidate),
    ):
        told = " ".join(f"{score:g}" for score in scores)
        yield f"   {letter}: {'' if answer is None else f'{_short(answer)!r}, '}scored {told}"


def _short(text: str) -> str:
    """On one line, cut where it is long, without control characters."""
    line = "".join(char if char.isprintable() else " " for char in " ".join(text.split()))
    return line if len(line) <= _TEXT else f"{line[:_TEXT]}..."


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, WIDTH, subsequent_indent="   ", break_long_words=False, break_on_hyphens=False)
