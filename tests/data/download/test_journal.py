"""What the journal vouches for survives, and nothing else does."""

import asyncio
import hashlib

import pytest

from vila_ops.data.download.journal import Journal
from vila_ops.data.download.outcome import DownloadRecord


def entry(number: int, body: bytes) -> tuple[DownloadRecord, bytes]:
    sha256 = hashlib.sha256(body).hexdigest()
    url = f"http://ä.test/{number}"
    return DownloadRecord(url, "ok", "", 200, 1, url, "png", len(body), sha256), body


ENTRIES = [entry(number, bytes([number]) * (number + 1)) for number in range(6)]
LOST = (DownloadRecord("http://lost.test/", "not_found", "status 404", 404, 1, "http://lost.test/"), b"")


@pytest.fixture
def written(tmp_path):
    """A journal of six images and one failure, as its two files' bytes."""
    with Journal(tmp_path / "a") as journal:
        for one in [*ENTRIES, LOST]:
            asyncio.run(journal.add(*one))
    return (tmp_path / "a.journal.jsonl").read_bytes(), (tmp_path / "a.bodies.partial").read_bytes()


def test_cut_anywhere_it_holds_the_records_that_were_whole(written, tmp_path):
    lines, bodies = written
    ends = {place + more for place, byte in enumerate(lines) if byte == 10 for more in (0, 1, 2)}
    for cut in sorted({0, 1, len(lines) // 2, *ends}):
        (tmp_path / "b.journal.jsonl").write_bytes(lines[:cut])
        (tmp_path / "b.bodies.partial").write_bytes(bodies + b"of an image that nobody vouched for")
        with Journal(tmp_path / "b") as journal:
            whole = lines[:cut].count(b"\n")
            assert list(journal.records.values()) == [record for record, _ in [*ENTRIES, LOST]][:whole]
            assert [journal.body(record.url) for record, _ in ENTRIES[:whole]] == [body for _, body in ENTRIES[:whole]]
        assert (tmp_path / "b.bodies.partial").read_bytes() == b"".join(body for _, body in ENTRIES[:whole])
        assert (tmp_path / "b.journal.jsonl").read_bytes() == b"".join(lines.splitlines(keepends=True)[:whole])


@pytest.mark.parametrize(
    "rubbish", [b"\0" * 512 + b"\n", b"[]\n", b"{}\n", b"\xff\xfe\n", b'{"offset": "x"}\n', b"null\n"]
)
def test_it_goes_on_behind_what_a_power_cut_left(written, tmp_path, rubbish):
    lines, bodies = written
    (tmp_path / "a.journal.jsonl").write_bytes(lines + rubbish)
    (tmp_path / "a.bodies.partial").write_bytes(bodies + bytes(4096))
    with Journal(tmp_path / "a") as journal:
        assert len(journal.records) == 7
        asyncio.run(journal.add(*entry(9, b"nine")))
    with Journal(tmp_path / "a") as journal:
        assert len(journal.records) == 8
        assert journal.body("http://ä.test/9") == b"nine"


def test_a_line_whose_image_is_not_there_vouches_for_nothing(written, tmp_path):
    _, bodies = written
    (tmp_path / "a.bodies.partial").write_bytes(bodies[:-1])
    with Journal(tmp_path / "a") as journal:
        assert len(journal.records) == 5


def test_a_image_that_changed_on_the_disk_is_not_handed_out(written, tmp_path):
    _, bodies = written
    (tmp_path / "a.bodies.partial").write_bytes(b"X" + bodies[1:])
    with Journal(tmp_path / "a") as journal, pytest.raises(ValueError, match="changed on the disk"):
        journal.body(ENTRIES[0][0].url)


def test_records_that_wait_for_the_disk_are_written_together_and_all_of_them(tmp_path):
    async def add_all(journal):
        await asyncio.gather(*(journal.add(*entry(number, b"x" * number)) for number in range(200)))

    with Journal(tmp_path / "a") as journal:
        asyncio.run(add_all(journal))
    with Journal(tmp_path / "a") as journal:
        assert len(journal.records) == 200
        assert all(journal.body(url) == b"x" * int(url.rpartition("/")[2]) for url in journal.records)


def test_two_processes_cannot_write_into_one_journal(tmp_path):
    with Journal(tmp_path / "a"), pytest.raises(ValueError, match="another process"):
        Journal(tmp_path / "a")
