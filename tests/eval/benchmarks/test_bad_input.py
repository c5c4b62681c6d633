"""What benchmarks on official files do with answers and files that are not as they should be."""

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.eval.benchmarks.sample import SAMPLES, config_of, copy_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import CocoCaptions, Flickr30kCaptions, Mmlu, Official, Pope
from vila_ops.config.eval import MeasureSettings
from vila_ops.eval.benchmark import benchmark_of
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.scoring import score

GENERATED = {**config_of(Mmlu).prompt.model_dump(), "answer": {"kind": "generate", "max_new_tokens": 4}}
CHANGES: dict[type, dict[str, Any]] = {
    Pope: {"version": None},
    Mmlu: {"shots": 2, "prompt": GENERATED},
    CocoCaptions: {"tokenizers": ["ptb_python"]},
}
"""What a sample, or a test without Java, needs."""
CONFIGS = [config_of(kind, **CHANGES.get(kind, {})) for kind in get_args(Official) if kind is not Flickr30kCaptions]
"""All but the captions of Flickr30k, which are read and scored as those of COCO."""
SETTINGS = MeasureSettings(bootstrap_resamples=20)
every = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)


def some_rows(config: Any) -> list[ItemRow]:
    """The right answer to every second item, and nothing to the others."""
    items = sample_items(config)
    places = {item.id: place for place, item in enumerate(items)}
    return rows_of(items, config, lambda item, _: item.answer if places[item.id] % 2 else "")


@every
def test_the_order_of_answers_changes_nothing(config: Any) -> None:
    items, rows = sample_items(config), some_rows(config)
    backwards = rows[::-1]
    assert numbers(backwards, items, config) == pytest.approx(numbers(rows, items, config))
    module: Any = benchmark_of(config.kind)
    assert module.official_files(items, backwards, config) == module.official_files(items, rows, config)


@every
def test_missing_doubled_and_foreign_answers_are_refused(config: Any) -> None:
    items, rows = sample_items(config), some_rows(config)
    with pytest.raises(ValueError, match=re.escape(f"1 items have no row, such as {rows[-1].item!r}")):
        score(items, rows[:-1], config, SETTINGS)
    with pytest.raises(ValueError, match=re.escape(f"item {rows[0].item!r} has 2 rows")):
        score(items, [*rows, rows[0]], config, SETTINGS)
    with pytest.raises(ValueError, match=re.escape(f"1 rows are of other items, such as {rows[0].item!r}")):
        score(items[1:], rows, config, SETTINGS)


@every
@pytest.mark.parametrize("answer", ["", "a\u2028b, " * 20_000], ids=["empty", "100,000 characters"])
def test_an_empty_or_very_long_answer_is_an_answer(config: Any, answer: str) -> None:
    items = sample_items(config)
    rows = rows_of(items, config, lambda *_: answer)
    scored = score(items, rows, config, SETTINGS)
    assert scored.measurement.failed == {}
    assert all(math.isfinite(metric.value) for metric in scored.measurement.metrics)
    module: Any = benchmark_of(config.kind)
    assert module.official_files(items, rows, config)


@every
def test_failed_items_are_wrong_or_left_out_by_the_policy_and_the_name_says_so(config: Any) -> None:
    items = sample_items(config)
    rows = rows_of(items, config, lambda item, _: None if item.group == items[0].group else item.answer)
    left_out = type(config).model_validate({**config.model_dump(), "failed_items": "left_out"})
    wrong, answered = numbers(rows, items, config), numbers(rows, items, left_out)
    assert all(name.endswith("_answered") for name in answered)
    for name in [name for name in wrong if name.endswith("_corrected") and f"{name}_answered" in answered]:
        assert wrong[name] <= answered[f"{name}_answered"]


def with_a_key_more(value: Any) -> Any:
    """The same JSON with a further key in every record: an object that is in a list, or has a number as its key."""
    if isinstance(value, list):
        return [{**with_a_key_more(one), "extra": 1} if isinstance(one, dict) else one for one in value]
    if isinstance(value, dict):
        return {
            key: {**with_a_key_more(one), "extra": 1}
            if key.isdecimal() and isinstance(one, dict)
            else with_a_key_more(one)
            for key, one in value.items()
        }
    return value


@every
def test_a_byte_order_mark_and_a_column_more_change_nothing(config: Any, tmp_path: Path) -> None:
    folder = copy_of(config.kind, tmp_path)
    for file in [path for suffix in ("json", "jsonl", "tsv", "txt", "csv") for path in folder.rglob(f"*.{suffix}")]:
        text = file.read_text()
        if file.suffix == ".tsv":
            text = "\n".join(f"{line}\textra" for line in text.splitlines()) if '"' not in text else text
        elif file.suffix in (".json", ".jsonl") and text.startswith('{"question_id"'):
            text = "\n".join(json.dumps({**json.loads(line), "extra": 1}) for line in text.splitlines())
        elif file.suffix == ".json":
            text = json.dumps(with_a_key_more(json.loads(text)))
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    items = list(benchmark_of(config.kind).read(folder, config))
    assert [(item.id, item.parts, item.options, item.answer) for item in items] == [
        (item.id, item.parts, item.options, item.answer) for item in sample_items(config)
    ]


@every
def test_a_missing_or_damaged_image_is_named_and_no_item_is_skipped(config: Any, tmp_path: Path) -> None:
    folder = copy_of(config.kind, tmp_path)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    images = [path for path in files if path.suffix in (".jpg", ".png") or path.parent.name == "SEED-Bench-image"]
    if not images:
        pytest.skip("it has no images, or they are in the table; see its own test")
    whole = sample_items(config)
    used = [path for path in images if any(path.name in item.group for item in whole)] or images
    used[0].unlink()
    used[1].write_bytes(b"no image")
    items = list(benchmark_of(config.kind).read(folder, config))
    assert [item.id for item in items] == [item.id for item in whole]
    problems = {item.problem() for item in items} - {None}
    assert any("is missing" in str(problem) for problem in problems)
    assert len(problems) == 2


@every
def test_a_missing_file_is_told_with_the_way_out(config: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`vila-ops benchmark list` says where"):
        list(benchmark_of(config.kind).read(tmp_path / config.kind, config))


def test_every_sample_is_listed_with_its_licence() -> None:
    page = (SAMPLES / "README.md").read_text()
    assert all(f"| `{config.kind}` |" in page for config in CONFIGS)
    assert "CC0-1.0" in page
