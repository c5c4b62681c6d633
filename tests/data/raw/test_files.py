import hashlib
import multiprocessing
import os
import random
import sqlite3
import time
import unicodedata
from contextlib import closing
from itertools import pairwise
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.config.sources import JsonLines
from vila_ops.data import sources
from vila_ops.data.raw import files as files_module
from vila_ops.data.raw.files import RawFile, RawMissing, Scan, Span, Thinned, on_disk, paths, scan_files

HOUR_NS = 3600 * 10**9
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""sha256 of nothing, and of "abc" (FIPS 180-2, appendix B.1)."""
ABD = hashlib.sha256(b"abd").hexdigest()


class Lines:
    """Scans files as one record a line, and notes which it looked at."""

    def __init__(self, cache: Path, *, beside: tuple[Path, ...] = ()) -> None:
        self.cache = cache
        self.beside = tuple(str(path) for path in beside)
        self.looked_at: list[str] = []

    def files(self, root: Path, *, kind: str = "lines") -> list[RawFile]:
        return scan_files(paths(root, (".txt", ".csv")), kind, self._scan, cache=self.cache)

    def _scan(self, path: Path) -> Scan:
        self.looked_at.append(path.name)
        count = len(path.read_bytes().splitlines())
        return Scan(count=count, images=2 * count, marks=(0,), beside=self.beside)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def lines(tmp_path: Path) -> Lines:
    return Lines(tmp_path / "cache")


def write(path: Path, content: bytes, *, age_ns: int = HOUR_NS) -> Path:
    """A file that was written so long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    changed = time.time_ns() - age_ns
    os.utime(path, ns=(changed, changed))
    return path


def test_a_file_is_told_with_its_digest_and_what_its_scan_found(raw: Path, lines: Lines):
    write(raw / "a.txt", b"abc")
    write(raw / "b.txt", b"")
    told = [(file.name, file.path, file.digest, file.count, file.images, file.marks) for file in lines.files(raw)]
    assert told == [
        ("a.txt", str(raw / "a.txt"), ABC, 1, 2, (0,)),
        ("b.txt", str(raw / "b.txt"), EMPTY, 0, 0, (0,)),
    ]


def test_files_come_in_the_order_of_their_names_whatever_the_order_on_the_disk(raw: Path):
    for name in ("b/2.txt", "b.txt", "a/z.TXT", "10.txt", "9.txt", "b/10.csv"):
        write(raw / name, b"")
    assert [name for name, _ in paths(raw, (".txt", ".csv"))] == [
        "10.txt", "9.txt", "a/z.TXT", "b.txt", "b/10.csv", "b/2.txt",
    ]  # fmt: skip


def test_hidden_and_half_files_and_other_formats_are_left_out(raw: Path):
    for name in ("a.txt", ".hidden.txt", ".git/b.txt", "sub/.c/d.txt", "e.txt.part", "f.txt.crdownload", "g.json"):
        write(raw / name, b"")
    (raw / "folder.txt").mkdir()
    assert paths(raw, (".txt",)) == [("a.txt", raw / "a.txt")]


def test_links_to_folders_are_followed_and_each_folder_is_listed_once(raw: Path, tmp_path: Path):
    """Kaggle/kagglehub#246, fastai/fastai#2270: a linked folder was left out without a word."""
    write(raw / "v2/a.txt", b"")
    write(tmp_path / "disk2/part/b.txt", b"")
    write(tmp_path / "disk2/c.txt", b"")
    (raw / "latest").symlink_to("v2")
    (raw / "more").symlink_to(tmp_path / "disk2")
    (raw / "file.txt").symlink_to(tmp_path / "disk2/c.txt")
    (raw / "v2/here").symlink_to(raw)
    assert [name for name, _ in paths(raw, (".txt",))] == ["file.txt", "more/c.txt", "more/part/b.txt", "v2/a.txt"]


def test_a_link_to_a_folder_above_is_refused(raw: Path):
    write(raw / "a.txt", b"")
    (raw / "up").symlink_to("..")
    with pytest.raises(ValueError, match=r"up is a link to .*, the folder that it is in; remove the link"):
        paths(raw, (".txt",))


@pytest.mark.parametrize("name", ["b.txt", "part-2"])
def test_a_link_whose_target_is_missing_is_refused(name: str, raw: Path):
    """treeverse/dvc#10500: with cache.type symlink, a checkout leaves links to files that its cache lacks."""
    write(raw / "a.txt", b"")
    (raw / "note.md").symlink_to("gone")
    assert [found for found, _ in paths(raw, (".txt",))] == ["a.txt"]
    (raw / name).symlink_to(".dvc/cache/9a")
    with pytest.raises(RawMissing, match=f"{name} is a link to .dvc/cache/9a, which is missing; bring it back"):
        paths(raw, (".txt",))


@pytest.mark.parametrize("end", [".zst", ".bz2", ".xz", ".gz"])
def test_a_file_that_is_compressed_in_another_form_is_not_left_out(end: str, raw: Path):
    """huggingface/datasets#2572, pull request 4421, datajuicer/data-juicer#919: shards of several compressions."""
    write(raw / "a.jsonl", b"")
    write(raw / "c.jpg.gz", b"")
    write(raw / f"b.JSONL{end}", b"")
    with pytest.raises(ValueError, match=f"b.JSONL{end} is compressed in a form that is not read here; unpack it"):
        paths(raw, (".jsonl",))
    assert len(paths(raw, (".jsonl", f".jsonl{end}"))) == 2


def test_a_file_may_be_named_itself(raw: Path):
    assert paths(write(raw / "one.data", b""), (".txt",)) == [("one.data", raw / "one.data")]


def test_what_is_not_there_is_an_error_that_says_where_it_was_looked_for(raw: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(raw)
    with pytest.raises(ValueError, match=f"no such file or folder: gone .looked for in {raw}"):
        paths(Path("gone"), (".txt",))
    write(raw / "a.json", b"")
    with pytest.raises(ValueError, match=r"has no file that ends in \.txt or \.csv"):
        paths(raw, (".txt", ".csv"))


def test_a_file_is_scanned_again_only_when_its_content_changes(raw: Path, lines: Lines):
    path = write(raw / "a.txt", b"1\n2\n")
    before = lines.files(raw)
    os.utime(path)
    assert lines.files(raw) == before
    assert lines.looked_at == ["a.txt"]
    write(path, b"1\n\n\n", age_ns=HOUR_NS // 2)
    (after,) = lines.files(raw)
    assert (after.count, before[0].count) == (3, 2)
    assert after.digest != before[0].digest
    assert lines.looked_at == ["a.txt", "a.txt"]


def test_a_young_file_that_changes_under_its_size_and_time_is_seen(raw: Path, lines: Lines):
    path = write(raw / "a.txt", b"abc", age_ns=-HOUR_NS)
    stamp = path.stat()
    (before,) = lines.files(raw)
    path.write_bytes(b"abd")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_ino == stamp.st_ino
    (after,) = lines.files(raw)
    assert before.digest == ABC
    assert after.digest == ABD


def test_an_edit_whose_time_is_put_back_is_seen(raw: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch):
    """Nothing puts back the time of the change itself (st_ctime)."""
    monkeypatch.setattr(files_module, "_RACE_NS", 0)  # a change of this moment may be remembered
    path = write(raw / "a.txt", b"abc")
    stamp = path.stat()
    (before,) = lines.files(raw)
    while path.stat().st_ctime_ns == stamp.st_ctime_ns:  # the clock of the file system ticks every few milliseconds
        path.write_bytes(b"abd")
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (stamp.st_size, stamp.st_mtime_ns, stamp.st_ino)
    (after,) = lines.files(raw)
    assert (before.digest, after.digest) == (ABC, ABD)


def test_an_unchanged_file_is_not_read_again(raw: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files_module, "_RACE_NS", 0)
    write(raw / "a.txt", b"abc")
    before = lines.files(raw)
    read: list[Path] = []
    monkeypatch.setattr(files_module, "sha256_of", read.append)
    assert lines.files(raw) == before
    assert not read


def damage(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_damaged_cache_is_made_again_wherever_the_damage_is(raw: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files_module, "_RACE_NS", 0)
    for number in range(3):
        write(raw / f"{number}.txt", b"line\n" * number)
    before = lines.files(raw)
    cache = lines.cache / "raw.sqlite"
    whole = cache.read_bytes()
    draw = random.Random(0)
    places = [*range(0, 100, 3), *(draw.randrange(len(whole)) for _ in range(150))]
    for place in places:
        cache.write_bytes(whole)
        damage(cache, place, draw.randrange(8))
        assert lines.files(raw) == before, place
    for content in (b"", b"no database", whole[:5000], bytes(len(whole)), whole[::-1]):
        cache.write_bytes(content)
        assert lines.files(raw) == before
    assert lines.files(raw) == before


def test_a_damaged_row_is_not_believed(raw: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files_module, "_RACE_NS", 0)
    write(raw / "a.txt", b"abc")
    before = lines.files(raw)
    with closing(sqlite3.connect(lines.cache / "raw.sqlite", isolation_level=None)) as database:
        changed = database.execute("update kept set value = replace(value, 'ba7816bf', 'ba7816be')").rowcount
    assert changed == 2
    assert lines.files(raw) == before


def test_a_cache_that_cannot_be_used_is_an_error_with_its_path(raw: Path, lines: Lines):
    write(raw / "a.txt", b"abc")
    (lines.cache / "raw.sqlite").mkdir(parents=True)
    with pytest.raises(OSError, match=r"raw\.sqlite cannot be used .*; free space there, or set resources"):
        lines.files(raw)


NAMES = ("Hünd.txt", "サクラ.txt", "Ángel/é.txt")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_beside_is_the_same_in_either_unicode_form(name: str, tmp_path: Path, raw: Path):
    """A zip of a Mac has names in NFD; the records that name them are mostly NFC."""
    digests = set()
    for form in ("NFC", "NFD"):
        folder = tmp_path / form
        write(folder / unicodedata.normalize(form, name), b"dog")
        write(raw / "a.txt", b"abc")
        for stated in ("NFC", "NFD"):
            path = folder / unicodedata.normalize(stated, name)
            assert on_disk(path).read_bytes() == b"dog"
        beside = folder / unicodedata.normalize("NFC", name)
        digests.add(Lines(tmp_path / f"cache-{form}", beside=(beside,)).files(raw)[0].digest)
    assert len(digests) == 1
    assert on_disk(tmp_path / "gone-ü") == tmp_path / "gone-ü"


def test_a_name_that_is_not_utf_8_is_an_error(raw: Path):
    (raw / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"a file whose name is not UTF-8: .*; rename it"):
        paths(raw, (".txt",))


def test_the_same_bytes_are_scanned_once_for_each_format_settings_and_place(raw: Path, lines: Lines):
    write(raw / "a.txt", b"1\n2\n")
    write(raw / "c.csv", b"1\n2\n")
    first, second = lines.files(raw)
    assert first.digest == second.digest
    assert lines.looked_at == ["a.txt", "c.csv"]
    lines.files(raw, kind="lines:other-settings")
    assert lines.looked_at == ["a.txt", "c.csv"] * 2
    lines.files(raw)
    assert lines.looked_at == ["a.txt", "c.csv"] * 2


def test_a_file_beside_changes_the_digest_when_it_comes_changes_or_goes(tmp_path: Path, raw: Path):
    image = tmp_path / "images/dog.png"
    write(raw / "a.txt", b"abc")
    lines = Lines(tmp_path / "cache", beside=(image,))

    def digest() -> str:
        (file,) = lines.files(raw)
        return file.digest

    missing = digest()
    write(image, b"dog")
    there = digest()
    write(image, b"cat", age_ns=HOUR_NS // 2)
    changed = digest()
    assert len({ABC, missing, there, changed}) == 4
    write(image, b"dog", age_ns=HOUR_NS // 4)
    assert digest() == there
    image.unlink()
    assert digest() == missing
    assert lines.looked_at == ["a.txt"]


def test_the_digest_does_not_depend_on_where_the_files_lie(tmp_path: Path, raw: Path):
    found = []
    for place in ("here", "there"):
        write(tmp_path / place / "a.txt", b"abc")
        beside = write(tmp_path / place / "images/dog.png", b"dog")
        found.append(Lines(tmp_path / f"cache-{place}", beside=(beside,)).files(tmp_path / place)[0].digest)
    assert found[0] == found[1]


def test_two_folders_with_the_same_records_have_their_own_images(tmp_path: Path):
    digests = []
    line = (
        b'{"id": "1", "object": "dog", "category": "", "licence": "CC0-1.0", "provenance": "", '
        b'"turns": [{"role": "document", "parts": [{"image": "dog.png"}]}]}\n'
    )
    for place, image in [("a", b"dog"), ("b", b"another dog"), ("c", b"dog")]:
        write(tmp_path / place / "records.jsonl", line)
        write(tmp_path / place / "dog.png", image)
        source = JsonLines(render="document", path=str(tmp_path / place))
        digests.append(sources.digest(source, cache=tmp_path / "cache"))
    assert digests[0] == digests[2] != digests[1]


def _scan_at_once(barrier: Barrier, root: Path, caches: list[Path]) -> None:
    for cache in caches:
        barrier.wait(30)
        files = Lines(cache).files(root)
        assert [(file.name, file.count) for file in files] == [(f"{number:02d}.txt", number) for number in range(20)]


@pytest.mark.slow
def test_processes_may_scan_with_one_cache_at_once(tmp_path: Path, raw: Path):
    for number in range(20):
        write(raw / f"{number:02d}.txt", b"line\n" * number)
    caches = [tmp_path / f"cache-{number}" for number in range(10)]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_scan_at_once, args=(barrier, raw, caches)) for _ in range(barrier.parties)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * barrier.parties


@given(st.integers(1, 300), st.integers(1, 400), st.lists(st.integers(0, 300), max_size=4))
def test_a_limit_takes_evenly_spaced_places_over_all_files(total: int, limit: int, cuts: list[int]):
    expected = {place * total // limit for place in range(limit)}
    borders = sorted({0, total, *(cut for cut in cuts if cut < total)})
    taken = set()
    for first, end in pairwise(borders):
        thinned = Thinned(first=first, total=total, limit=limit)
        taken |= {first + number for number in range(end - first) if thinned.takes(number)}
    assert taken == expected
    assert len(taken) == min(limit, total)


def test_a_span_takes_every_record_where_its_source_is_not_limited():
    span = Span(name="a.txt", path="a.txt", digest=ABC, start=0, stop=3, mark=0)
    assert [number for number in range(3) if span.takes(number)] == [0, 1, 2]
