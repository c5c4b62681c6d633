"""Every shipped config is found by its name, and what is not there is an error that lists what is."""

from pathlib import Path

import pytest

from vila_ops.config.named import config_file

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = [
    (path, folder)
    for folder in ("recipes", "resources", "suites", "lengths", "retrain", "grids", "")
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
]


@pytest.mark.parametrize(("path", "folder"), SHIPPED, ids=[f"{folder}/{path.stem}" for path, folder in SHIPPED])
def test_a_shipped_config_is_found_by_its_name(
    path: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file(Path(path.stem), folder) == path


@pytest.mark.parametrize("given", ["vila-7b.yaml", "vila-7b.yml", "recipes/vila-7b"])
def test_a_path_stays_a_path_also_where_there_is_no_such_file(given: str) -> None:
    assert config_file(Path(given), "recipes") == Path(given)


def test_an_unknown_name_with_a_point_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'vila1\.5-3b'"):
        config_file(Path("vila1.5-3"), "recipes")
