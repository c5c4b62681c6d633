"""A file of the user's, or a folder in use, where a command would write: told before any work, and left as it is."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from vila_ops.cli import app, main
from vila_ops.config import Resources

ROOT = Path(__file__).parents[2]
TINY = "configs/recipes/tiny.yaml"
STRANGERS = {
    "folder": ("data/tiny_align/photo.jpg", ["prepare", "--mixture", "tiny_align", "--out", "data/tiny_align"]),
    "raw data": ("data/tiny_align.json", ["prepare", "--mixture", "tiny_align", "--out", "data/tiny_align"]),
    "note": ("data/tiny_align.md", ["prepare", "--mixture", "tiny_align", "--out", "data/tiny_align"]),
    "table": ("data/tiny_align.left_out.csv", ["prepare", "--mixture", "tiny_align", "--out", "data/tiny_align"]),
    "page": ("page.html", ["data", "show", "--mixture", "tiny_align", "--out", "page.html"]),
    "drawing": ("plot.svg", ["alignment", "--out", "plot.svg"]),
    "summary": ("store/tiny/summary.json", ["run"]),
    "report": ("store/tiny/report.html", ["run"]),
    "question": ("store/tiny/ask.json", ["run"]),
    "file for a folder": ("store/tiny", ["run"]),
}
"""A file of the user's, and the command that would replace it."""


def paths(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for a store, cache and data folder that are not there yet, from a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "resources.yaml"
    file.write_text(
        yaml.safe_dump({"launch": "inline", "storage": {"store": "store", "cache": "cache", "data": "data"}})
    )
    return [str(ROOT / TINY), "-r", str(file)]


@pytest.mark.parametrize("of", STRANGERS)
def test_a_file_of_the_user_s_is_told_before_any_work_and_survives(
    of: str, untouched: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, command = STRANGERS[of]
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("<html>mine</html>")
    words = 2 if command[0] == "data" else 1
    monkeypatch.setattr(sys, "argv", ["vila-ops", *command[:words], *untouched, *command[words:]])
    with pytest.raises(SystemExit, match="1"):
        main()
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert mine.name in told
    assert "vila-ops did not write" in told
    assert "move th" in told
    assert mine.read_text() == "<html>mine</html>"
    assert paths(tmp_path) == sorted([name, "resources.yaml"])


@pytest.mark.parametrize("place", [".", "..", "store", "cache", "~"])
def test_a_dataset_is_not_written_over_a_folder_in_use(
    place: str, untouched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    out = str(Path(place).expanduser())
    done = CliRunner().invoke(app, ["prepare", *untouched, "--mixture", "tiny_align", "--out", out])
    assert done.exit_code == 1
    assert f"{out} is or contains " in str(done.exception)
    assert paths(tmp_path) == ["resources.yaml"]


def test_a_dataset_is_not_written_into_the_raw_data(untouched: list[str], tmp_path: Path) -> None:
    """Its files would be raw data of the next revision."""
    out = "tests/tiny/pairs/mine"
    done = CliRunner().invoke(app, ["prepare", *untouched, "--mixture", "tiny_align", "--out", out])
    assert f"{out} lies in tests/tiny/pairs, from which data is read" in str(done.exception)
    assert paths(tmp_path) == ["resources.yaml"]


def test_what_we_wrote_is_replaced_without_a_word(
    tmp_path: Path, make_resources: Callable[..., Resources], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    resources, out = tmp_path / "resources.yaml", tmp_path / "out"
    resources.write_text(yaml.safe_dump(make_resources(tmp_path).model_dump(mode="json")))
    where = (TINY, "-r", str(resources), "--mixture", "tiny_align", "--out")
    said = set()
    for command, name in 2 * ((["prepare"], "mine"), (["data", "show"], "page.html")):
        done = CliRunner().invoke(app, [*command, *where, str(out / name), "--json"])
        assert done.exit_code == 0, done.output
        said.add(done.stdout)
    assert len(said) == 1, "the dataset of the first time"
    beside = ["json", "md", *(f"{table}.csv" for table in ("samples", "tokens", "images", "left_out"))]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["mine", "page.html", *(f"mine.{suffix}" for suffix in beside)]
    )
    before = paths(out / "mine")
    (out / "mine.json").write_text('{"images": [{"file_name": "a.jpg"}]}')
    refused = CliRunner().invoke(app, ["prepare", *where, str(out / "mine")])
    assert f"{out / 'mine.json'} exists and vila-ops did not write it" in str(refused.exception)
    assert paths(out / "mine") == before
