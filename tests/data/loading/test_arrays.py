import concurrent.futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vila_ops.data.loading.arrays import CHECKS, HEADER, PIECE, Arrays, DamagedCache, _header

VALUES = np.arange(100_000, dtype=np.uint32)  # 25 pieces


class Maker:
    """Fills a folder, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.calls += 1
        np.save(folder / "values.npy", VALUES)
        np.save(folder / "empty.npy", np.empty(0, np.int64))
        return {"what": "numbers"}


@pytest.fixture
def make() -> Maker:
    return Maker()


def test_arrays_are_made_once_and_read_in_part(tmp_path: Path, make: Maker) -> None:
    for _ in range(3):
        arrays = Arrays(tmp_path / "deep" / "one", make)
        assert arrays.facts == {"what": "numbers"}
        assert arrays.read("values", 50_000, 50_003).tolist() == [50_000, 50_001, 50_002]
        assert (arrays.read("values") == VALUES).all()
        assert arrays.read("values", 100_000).tolist() == []
        assert arrays.read("empty").tolist() == []
    assert make.calls == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["one"], "no drafts are left"


@pytest.mark.parametrize("damage", ["shorter", "gone", "header", "no header", "no checks", "other checks"])
def test_a_folder_that_is_not_whole_is_rebuilt(damage: str, tmp_path: Path, make: Maker) -> None:
    folder = Arrays(tmp_path / "one", make).folder
    match damage:
        case "shorter":
            (folder / "values.npy").write_bytes((folder / "values.npy").read_bytes()[:-1])
        case "gone":
            (folder / "values.npy").unlink()
        case "header":
            (folder / HEADER).write_text((folder / HEADER).read_text().replace("numbers", "letters"))
        case "no checks":
            (folder / f"values{CHECKS}").unlink()
        case "other checks":
            path = folder / f"values{CHECKS}"
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        case "no header":
            (folder / HEADER).unlink()
    arrays = Arrays(folder, make)
    assert make.calls == 2
    assert (arrays.read("values") == VALUES).all()
    assert arrays.facts == {"what": "numbers"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["values.npy", f"values{CHECKS}", HEADER])
def test_every_flipped_bit_of_the_first_200_bytes_is_healed(name: str, tmp_path: Path) -> None:
    """Among them are those of numpy's header, which numpy evaluates as Python, and those of our JSON."""
    values = np.arange(5000, dtype=np.uint32)
    calls = []

    def make(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        np.save(folder / "values.npy", values)
        np.save(folder / "empty.npy", np.empty(0, np.int64))
        return {"what": "numbers"}

    path = Arrays(tmp_path / "one", make).folder / name
    whole = path.read_bytes()
    flips = range(8 * min(200, len(whole)))
    for bit in flips:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert _header(tmp_path / "one") is None, "it is not opened"
        if bit % 97 == 0:
            assert Arrays(tmp_path / "one", make).read("values", 4999).tolist() == [4999]
            assert path.read_bytes() == whole
    assert len(calls) == 1 + len(flips[::97])
    assert [one.name for one in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("taken", ["a file", "a link", "a folder"])
def test_whatever_has_the_name_of_the_folder_is_replaced(taken: str, tmp_path: Path, make: Maker) -> None:
    match taken:
        case "a file":
            (tmp_path / "one").write_text("")
        case "a link":
            (tmp_path / "one").symlink_to(tmp_path / "nowhere")
        case "a folder":
            (tmp_path / "one" / HEADER).mkdir(parents=True)
    assert (Arrays(tmp_path / "one", make).read("values") == VALUES).all()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("element", [20_000, 99_999])
def test_a_flipped_bit_is_found_where_it_is_read_and_nowhere_else(element: int, tmp_path: Path, make: Maker) -> None:
    path = Arrays(tmp_path / "one", make).folder / "values.npy"
    data = bytearray(path.read_bytes())
    data[len(data) - 4 * (len(VALUES) - element)] ^= 1
    path.write_bytes(data)
    arrays = Arrays(tmp_path / "one", make)
    piece = PIECE // 4
    far = 50_000
    assert abs(far - element) > piece
    assert arrays.read("values", far, far + 2).tolist() == [far, far + 1]
    with pytest.raises(DamagedCache, match=r"values differs from its CRC-32 in piece \d+"):
        arrays.read("values", element, element + 1)
    with pytest.raises(DamagedCache, match="values differs"):
        arrays.read("values")


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path, make: Maker) -> None:
    def broken(folder: Path) -> dict[str, Any]:
        make(folder)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        Arrays(tmp_path / "one", broken)
    assert list(tmp_path.iterdir()) == []


def test_many_may_make_it_at_once(tmp_path: Path) -> None:
    """All find it missing; one's folder stays, and all read the same."""

    def one(_: int) -> bool:
        arrays = Arrays(tmp_path / "one", Maker())
        return bool((arrays.read("values") == VALUES).all())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(16)))
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
