import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.data.raw import tars
from vila_ops.data.raw.tars import BadTar, Member, members


def entry(name: str, content: bytes = b"x", **more: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def tar(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT, **more: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, **more) as file:  # type: ignore[call-overload]
        for info, content in entries:
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def listed(data: bytes) -> list[tuple[str, bytes]]:
    file = io.BytesIO(data)
    return [(member.name, data[member.data : member.data + member.size]) for member in members(file)]


LONG = "folder/" * 30 + "ein Bär.jpg"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_regular_files_are_found_as_python_finds_them_in_every_form(form: int):
    names = [
        "a.jpg",
        "b/c.txt",
        "empty.txt",
        "d" * 90 + "/" + "e" * 90,
        *([] if form == tarfile.USTAR_FORMAT else [LONG]),
    ]
    entries = [entry(name, name.encode() * (number * 300)) for number, name in enumerate(names, start=0)]
    folder = tarfile.TarInfo("b")
    folder.type = tarfile.DIRTYPE
    data = tar((folder, b""), *entries, form=form)
    with tarfile.open(fileobj=io.BytesIO(data)) as official:
        theirs = [(info.name, official.extractfile(info).read()) for info in official if info.isreg()]  # type: ignore[union-attr]
    assert listed(data) == theirs
    assert len(theirs) == len(names)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reading_on_from_a_members_head_finds_it_and_all_after_it(form: int):
    data = tar(*(entry(f"{number}/{LONG}", bytes(number)) for number in range(5)), form=form)
    found = list(members(io.BytesIO(data)))
    for number, member in enumerate(found):
        assert list(members(io.BytesIO(data), start=member.head)) == found[number:]


def link(kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return entry("a.jpg", b"", type=kind, linkname="/etc/passwd")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar(entry("../a.jpg")), r"'\.\./a\.jpg' at byte 0 is absolute, empty or has"),
        (tar(entry("ok.jpg"), entry("a/../../b.jpg")), r"'a/\.\./\.\./b\.jpg' at byte 1024"),
        (tar(entry("/etc/passwd")), "'/etc/passwd' at byte 0 is absolute"),
        (tar(entry("/" + LONG), form=tarfile.GNU_FORMAT), "at byte 0 is absolute"),
        (tar(entry("../" + LONG), form=tarfile.PAX_FORMAT), "at byte 0 is absolute, empty or has"),
        (tar(link(tarfile.SYMTYPE)), "'a.jpg' at byte 0 is a symbolic link; .* `tar --dereference`"),
        (tar(link(tarfile.LNKTYPE)), "is a hard link; .* write it with `tar --hard-dereference`"),
        (tar(link(tarfile.CHRTYPE)), "is a device"),
        (tar(link(tarfile.BLKTYPE)), "is a device"),
        (tar(link(tarfile.FIFOTYPE)), "is a fifo"),
        (tar(entry("a.jpg", b"", type=b"V")), "is of type b'V'"),
        (tar(entry("a.jpg", b"", type=tarfile.GNUTYPE_SPARSE), form=tarfile.GNU_FORMAT), "is a sparse file"),
        (tar(entry("a", pax_headers={"GNU.sparse.major": "1"}), form=tarfile.PAX_FORMAT), "a sparse file; write"),
        (tar(entry("a", pax_headers={"comment": "x" * 70_000}), form=tarfile.PAX_FORMAT), "65536 at most"),
        (tar(entry("a", pax_headers={"size": "-5"}), form=tarfile.PAX_FORMAT), "'-5', which is not a number"),
        (tar(entry("a", pax_headers={"size": "99999999999"}), form=tarfile.PAX_FORMAT), "needs 99999999999 bytes"),
        (tar(entry("a"), form=tarfile.PAX_FORMAT, pax_headers={"path": "b"}), "sets path of all members at once"),
        (tar(entry("a\udcff.jpg"), form=tarfile.GNU_FORMAT), "is not text"),
        (tar(entry("a.jpg")) + tar(entry("b.jpg")), r"it ends at byte 1024, but .* put tars together"),
        (b"", "truncated: it ends at byte 0"),
        (b"\x1f\x8b" + bytes(600), "no tar header at byte 0"),
    ],
)  # fmt: skip
def test_what_a_tar_of_data_should_not_hold_is_refused_with_its_place(data: bytes, message: str):
    with pytest.raises(BadTar, match=message):
        list(members(io.BytesIO(data)))


def test_a_size_below_zero_or_beyond_the_file_is_refused_before_it_is_read():
    for size in (-(2**40), 2**62):
        data = bytearray(tar(entry("a.jpg"), form=tarfile.GNU_FORMAT))
        data[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 256**11).to_bytes(11, "big")
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        with pytest.raises(BadTar, match="not a number of bytes" if size < 0 else "truncated"):
            list(members(io.BytesIO(bytes(data))))


def test_a_tar_cut_anywhere_is_refused_and_says_where():
    data = tar(entry("a.jpg", b"x" * 700), entry("b/" + LONG, b"y" * 100), form=tarfile.GNU_FORMAT)
    content = 512 + 1024 + 3 * 512 + 512
    for cut in range(0, content, 37):
        with pytest.raises(BadTar, match=r"truncated|no tar header"):
            list(members(io.BytesIO(data[:cut])))
    assert len(list(members(io.BytesIO(data[: content + 512])))) == 2


def test_a_million_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert tars.MAX_ENTRIES == 10**6
    monkeypatch.setattr(tars, "MAX_ENTRIES", 1000)
    header = entry("a.jpg", b"")[0].tobuf(tarfile.USTAR_FORMAT)
    assert len(list(members(io.BytesIO(header * 1000 + bytes(1024))))) == 1000
    with pytest.raises(BadTar, match="more than 1,000 entries"):
        list(members(io.BytesIO(header * 1001 + bytes(1024))))


WHOLE = tar(entry("a.jpg", b"x" * 700), entry("b/" + LONG, b"y" * 100), entry("c.txt"), form=tarfile.PAX_FORMAT)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 5 * 512), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, len(WHOLE)),
    st.booleans(),
)
def test_a_damaged_tar_is_read_or_refused_but_never_read_outside_of_itself(
    changes: list[tuple[int, int]], length: int, with_sums: bool
):
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
        if with_sums:  # so that the damage is not found by the header's checksum alone
            start = place // 512 * 512
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    cut = bytes(data[:length])
    try:
        found: list[Member] = list(members(io.BytesIO(cut)))
    except BadTar:
        return
    assert all(0 < member.data <= member.data + member.size <= len(cut) for member in found)
    assert all(not member.name.startswith("/") and ".." not in member.name.split("/") for member in found)
