"""MMBench and MMBench-CN from the official table to numbers and uploads; the rules are tested in metrics/."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.eval.benchmarks.sample import SAMPLES, cells, config_of, copy_of, numbers, rows_of, sample_items
from vila_ops.config.benchmarks import MmBench, MmBenchCn
from vila_ops.eval.benchmark import Item, TextPrompt
from vila_ops.eval.benchmarks import mmbench
from vila_ops.eval.metrics.circular import STRIDE
from vila_ops.eval.xlsx import xlsx

CONFIG = config_of(MmBench)
FILE = "mmbench_dev_20230712.tsv"
NAME = "mmbench_dev_20230712"


def reply(item: Item, rotation: int) -> str | None:
    """241 right by letters and texts; 252 without its second rotation; 263 wrong in its third."""
    if item.id == str(252 + STRIDE):
        return None
    if item.id == str(263 + 2 * STRIDE):
        return next(letter for letter in "ABCD" if letter != item.answer)
    return item.options["ABCD".index(item.answer)] if rotation == 1 else f"{item.answer}."


def rows_in(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / FILE).read_text()), delimiter="\t"))


def write(folder: Path, rows: list[dict[str, str]]) -> None:
    with (folder / FILE).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_the_numbers_by_hand() -> None:
    items = sample_items(CONFIG)
    assert len(items) == 3 + 2 + 4
    # The official code tests the rotations that are there, so that 252 is right; it is incomplete.
    assert numbers(rows_of(items, CONFIG, reply), items, CONFIG) == {
        f"{NAME}_official": pytest.approx(2 / 3),
        f"{NAME}_corrected": pytest.approx(1 / 3),
        f"{NAME}_incomplete": pytest.approx(1 / 3),
    }


def test_a_rotation_that_the_file_lacks_is_incomplete_too(tmp_path: Path) -> None:
    folder = copy_of("mmbench", tmp_path)
    write(folder, [row for row in rows_in(folder) if row["index"] != str(252 + STRIDE)])
    items = list(mmbench.read(folder, CONFIG))
    by_name = numbers(rows_of(items, CONFIG, lambda item, _: item.answer), items, CONFIG)
    assert by_name[f"{NAME}_official"] == 1
    assert by_name[f"{NAME}_corrected"] == pytest.approx(2 / 3)
    assert by_name[f"{NAME}_incomplete"] == pytest.approx(1 / 3)


def test_a_file_without_rotations_gets_those_of_the_official_one(tmp_path: Path) -> None:
    folder = copy_of("mmbench", tmp_path)
    write(folder, [row for row in rows_in(folder) if int(row["index"]) < STRIDE])

    def by_id(items: list[Item]) -> dict[str, tuple[tuple[str, ...], str]]:
        return {item.id: (item.options, item.answer) for item in items}

    assert by_id(list(mmbench.read(folder, CONFIG))) == by_id(sample_items(CONFIG))


def test_an_option_may_be_none_and_empty_cells_of_pandas_are_none(tmp_path: Path) -> None:
    """A counted zero is written as None, which readers of the table take for an empty cell (VLMEvalKit#1559)."""
    row = {**rows_in(SAMPLES / "mmbench")[0], "index": "7", "question": "How many are there?"}
    cases = [
        (("None", "One", "Two", ""), "A", ("None", "One", "Two")),
        (("One", "None", "Two", "nan"), "A", ("One", "None", "Two")),
        (("One", "Two", "None", "None"), "C", ("One", "Two", "None")),
        (("One", "Two", "nan", "nan"), "B", ("One", "Two")),
    ]
    for number, (cells_, answer, options) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, [{**row, **dict(zip("ABCD", cells_, strict=True)), "answer": answer}])
        items = list(mmbench.read(folder, CONFIG))
        rotated = [options[place:] + options[:place] for place in range(len(options))]
        assert [item.options for item in items] == rotated
        assert [item.options["ABCD".index(item.answer)] for item in items] == [cells_["ABCD".index(answer)]] * len(
            items
        )


def test_requests_name_their_rotation_and_write_the_options_in_its_order() -> None:
    requests = {one.item: one for one in mmbench.requests(sample_items(CONFIG), CONFIG, lambda: None)}  # type: ignore[arg-type, return-value]
    assert {one.item: one.rotation for one in requests.values() if one.item.endswith("252")} == {"252": 0, "1000252": 1}
    prompt = requests["1000241"].prompt
    assert isinstance(prompt, TextPrompt)
    assert prompt.turns[0][1][1] == (
        "\nOnly one is there.\nWhich shape is shown?\nA. square\nB. triangle\nC. circle\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_an_image_may_be_that_of_another_row(tmp_path: Path) -> None:
    folder = copy_of("mmbench", tmp_path)
    rows = rows_in(folder)
    write(
        folder,
        [{**row, "image": str(int(row["index"]) % STRIDE)} if int(row["index"]) > STRIDE else row for row in rows],
    )
    for item, own in zip(mmbench.read(folder, CONFIG), sample_items(CONFIG), strict=True):
        assert (item.parts["image"], item.group) == (own.parts["image"], own.group)


def test_a_broken_image_is_named_and_its_item_stays(tmp_path: Path) -> None:
    folder = copy_of("mmbench", tmp_path)
    rows = rows_in(folder)
    rows[0]["image"] = rows[0]["image"][:100] + "!" + rows[0]["image"][100:]
    rows[1]["image"] = rows[1]["image"][:200]
    rows[2]["image"] = ""
    write(folder, rows)
    items = list(mmbench.read(folder, CONFIG))
    problems = [item.problem() for item in items]
    assert str(problems[0]).startswith("row 241: not base64: ")
    assert str(problems[1]).startswith("row 1000241: ")
    assert str(problems[2]).startswith("row 2000241: ")
    assert problems[3:] == [None] * 6


def test_the_upload_has_the_rows_of_the_file_with_predictions() -> None:
    items = sample_items(CONFIG)
    answers = {"241": "=1+1", "1000241": "a\x07b\n<c>", "2000241": "x" * 100_000}
    rows = rows_of(items, CONFIG, lambda item, _: answers.get(item.id, item.answer))
    header, *table = cells(mmbench.official_files(items, rows, CONFIG)[f"{NAME}.xlsx"])
    assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [row[0] for row in table] == [item.id for item in items]
    assert table[0] == ["241", "Which shape is shown?", "circle", "square", "triangle", "", "=1+1", "A", "dev"]
    assert table[1][6] == "a_x0007_b\n<c>"
    assert len(table[2][6]) == 32_767
    assert [row[6] for row in table[3:]] == [row[7] for row in table[3:]]


def test_a_text_like_an_escape_is_escaped_and_equal_tables_are_equal_bytes() -> None:
    assert cells(xlsx([["_x0007_", "_xyz_"]])) == [["_x005F_x0007_", "_xyz_"]]
    assert xlsx([["a"]]) == xlsx([["a"]])


def test_without_answers_there_is_an_upload_and_no_number(tmp_path: Path) -> None:
    folder = copy_of("mmbench", tmp_path)
    write(folder, [{name: cell for name, cell in row.items() if name != "answer"} for row in rows_in(folder)])
    items = list(mmbench.read(folder, CONFIG))
    rows = rows_of(items, CONFIG, lambda *_: "A")
    assert numbers(rows, items, CONFIG) == {}
    assert cells(mmbench.official_files(items, rows, CONFIG)[f"{NAME}.xlsx"])[0][-2:] == ["prediction", "split"]


def cut(text: str) -> str:
    return text.rsplit("\t", 3)[0] + "\n"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (cut, "row 9 has another number of cells"),
        (lambda text: text.replace("\n241\t", "\nx241\t"), "'x241' is no index"),
        (lambda text: text.replace("\nindex", "\nid", 1).replace("index\t", "id\t", 1), "record 1 has no 'index'"),
        (lambda text: text.replace("\tA\tobject", "\tE\tobject", 1), "row 241 has 3 options and the answer 'E'"),
    ],
)
def test_a_faulty_table_is_named(own: Callable[[str], str], message: str, tmp_path: Path) -> None:
    folder = copy_of("mmbench", tmp_path)
    (folder / FILE).write_text(own((folder / FILE).read_text()))
    with pytest.raises(ValueError, match=f"{FILE}.*{message}"):
        list(mmbench.read(folder, CONFIG))


def test_the_chinese_table_has_its_own_hint_and_name() -> None:
    config = config_of(MmBenchCn)
    items = sample_items(config)
    assert numbers(rows_of(items, config, lambda item, _: item.answer), items, config) == {
        "mmbench_cn_dev_20231003_official": 1,
        "mmbench_cn_dev_20231003_corrected": 1,
        "mmbench_cn_dev_20231003_incomplete": 0,
    }
    prompt = mmbench.requests(items, config, lambda: None)[0].prompt  # type: ignore[arg-type, return-value]
    assert isinstance(prompt, TextPrompt)
    assert prompt.turns[0][1][1] == (
        "\n只有一个形状。\n图中是什么形状?\nA. 圆形\nB. 正方形\nC. 三角形\n请直接回答选项字母。"
    )
    assert (SAMPLES / "mmbench_cn/mmbench_dev_cn_20231003.tsv").is_file()
