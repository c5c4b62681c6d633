"""The downloader against a real server with faults: every outcome as the server's plan says."""

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila_ops.data.download import download, download_source, key_of, run
from vila_ops.data.download.journal import Journal
from vila_ops.data.inspect.guess import guess
from vila_ops.data.raw.objects import raw_path

URLS = int(os.environ.get("VILA_URLS", "1000"))
KILLS = 5
SLOW = ("busy", "trickle", "trickle_headers", "stopped", "silent")
PROGRAM = """
import asyncio, json, pathlib, sys
from vila_ops.config.download import DownloadSettings
from vila_ops.data.download import download

async def here(host, port):
    return ["127.0.0.1"] if host.endswith(".test") else [host]

asked = json.load(sys.stdin)
settings = DownloadSettings.model_validate(asked["settings"])
print("begins", flush=True)
asyncio.run(download(asked["urls"], pathlib.Path(asked["out"]), settings=settings, resolve=here))
"""


def rows_of(out: Path) -> dict[str, dict]:
    return {row["url"]: row for row in pq.read_table(out.with_name(out.name + ".parquet")).to_pylist()}


def check(cases, server, out: Path) -> None:
    """Every row and every member of the tar against the plan."""
    rows = rows_of(out)
    assert list(rows) == [case.url(server.port) for case in cases]
    wrong = []
    for case in cases:
        row = rows[case.url(server.port)]
        final = row["url"] if case.moved_to is None else case.moved_to.format(port=server.port)
        if final.startswith("/"):
            final = final if case.kind == "moved_here" else f"http://ok-png.test:{server.port}{final}"
        found = (row["outcome"], row["http_status"], row["final_url"].removeprefix(f"http://{case.host}:{server.port}"))
        said = (case.outcome, case.status, final.removeprefix(f"http://{case.host}:{server.port}"))
        sha256 = hashlib.sha256(case.body).hexdigest() if case.outcome == "ok" else None
        if found != said or row["sha256"] != sha256:
            wrong.append((case.kind, found, said, row["detail"]))
    assert not wrong
    with tarfile.open(out.with_name(out.name + ".tar")) as tar:
        members = {member.name: member for member in tar}
        assert [name.partition(".")[0] for name in members] == [row["key"] for row in rows.values() if row["sha256"]]
        for row in rows.values():
            if row["sha256"]:
                member = members[f"{row['key']}.{row['extension']}"]
                assert (member.offset, member.size) == (row["offset"], row["bytes"])
                assert hashlib.sha256(tar.extractfile(member).read()).hexdigest() == row["sha256"]


@pytest.mark.slow
def test_every_outcome_is_what_the_server_did(server, plan, make_settings, names, tmp_path):
    cases = plan(URLS)
    urls = server.plan(cases)
    work = download(urls, tmp_path / "a", settings=make_settings(), resolve=names)
    canary = asyncio.run(_with_canary(server.port, work))
    check(cases, server, tmp_path / "a")
    assert canary == 0
    rows = rows_of(tmp_path / "a")
    asked = {case.path: case.requests for case in cases if case.kind != "ok_png"}  # others redirect to that
    assert {path: server.seen[path] for path in asked} == asked
    attempts = {
        case.path: rows[case.url(server.port)]["attempts"] for case in cases if case.kind not in ("ok_png", "loop")
    }
    assert attempts == {path: asked[path] for path in attempts}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "a.tar"]


def test_a_url_is_asked_once_however_often_it_stands_in_the_file(server, case, make_settings, names, tmp_path):
    first, second = server.plan([case("ok_png", 1), case("ok_jpeg", 2)])
    work = download([second, first, second, second, first], tmp_path / "a", settings=make_settings(), resolve=names)
    outcomes = asyncio.run(work)
    assert (outcomes.counts, sum(server.seen.values())) == ({"ok": 2}, 2)
    assert list(rows_of(tmp_path / "a")) == [second, first]


def test_what_is_finished_asks_nothing(server, plan, make_settings, names, tmp_path):
    urls = server.plan([case for case in plan(100) if case.kind.startswith("ok")])
    done = asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names))
    server.plan([])
    assert asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names)) == done
    assert not server.seen


@pytest.mark.slow
def test_the_same_answers_give_the_same_bytes_in_whatever_order_they_come(server, plan, make_settings, names, tmp_path):
    cases = [case for case in plan(150) if case.kind not in SLOW]
    for name, concurrency, delay in (("a", 1, 0.0), ("b", 32, 0.02)):
        urls = server.plan(cases, delay_seconds=delay)
        settings = make_settings(concurrency=concurrency)
        asyncio.run(download(urls, tmp_path / name, settings=settings, resolve=names))
    for kind in ("tar", "parquet"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_retry_asks_again_for_those_outcomes_only(server, case, make_settings, names, tmp_path):
    good, other, lost = case("ok_png"), case("missing"), case("failing")
    urls = server.plan([good, lost, other])
    asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names))
    healed = dataclasses.replace(case("ok_gif"), kind="failing", outcome="ok")
    server.plan([good, healed, other])
    work = download(urls, tmp_path / "a", settings=make_settings(), resolve=names, retry=("server_error", "timeout"))
    outcomes = asyncio.run(work)
    assert (outcomes.counts, dict(server.seen)) == ({"not_found": 1, "ok": 2}, {healed.path: 1})
    check([good, healed, other], server, tmp_path / "a")


def test_a_host_that_fails_too_often_in_a_row_is_given_up_and_others_are_not(
    server, case, make_settings, names, tmp_path
):
    limited = [case("always_limited", number) for number in range(30)]
    urls = server.plan([*limited, case("failing"), case("ok_png")])
    settings = make_settings(concurrency=1, attempts=1, host_failures=7)
    outcomes = asyncio.run(download(urls, tmp_path / "a", settings=settings, resolve=names))
    assert outcomes.counts == {"host_given_up": 23, "ok": 1, "rate_limited": 7, "server_error": 1}
    assert sum(server.seen[one.path] for one in limited) == 7
    assert [row["attempts"] for row in rows_of(tmp_path / "a").values()] == [1] * 7 + [0] * 23 + [1, 1]


def test_a_success_in_between_keeps_a_host(server, case, make_settings, names, tmp_path):
    good = [dataclasses.replace(case("ok_png", number), kind="always_limited") for number in range(0, 20, 5)]
    taken = {one.number for one in good}
    bad = [case("always_limited", number) for number in range(20) if number not in taken]
    urls = server.plan(sorted([*good, *bad], key=lambda one: one.number))
    settings = make_settings(concurrency=1, attempts=1, host_failures=5)
    outcomes = asyncio.run(download(urls, tmp_path / "a", settings=settings, resolve=names))
    assert outcomes.counts == {"ok": 4, "rate_limited": 16}


@pytest.mark.parametrize("manifest", ["there", "missing"])
def test_a_kill_between_the_last_steps_is_only_tidied_up(
    manifest, server, plan, make_settings, names, tmp_path, monkeypatch
):
    urls = server.plan([one for one in plan(60) if one.kind not in SLOW])
    with monkeypatch.context() as killed:
        killed.setattr(Journal, "remove", lambda journal: None)
        done = asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names))
    made = {kind: (tmp_path / f"a.{kind}").read_bytes() for kind in ("tar", "parquet")}
    if manifest == "missing":
        (tmp_path / "a.parquet").unlink()
    server.plan([])
    assert asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names)) == done
    assert not server.seen
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {f"a.{kind}": made[kind] for kind in made}


def test_a_full_disk_is_an_error_and_the_rest_is_fetched_when_there_is_room(
    server, plan, make_settings, names, tmp_path, monkeypatch
):
    cases = [one for one in plan(120) if one.kind not in SLOW]
    urls = server.plan(cases)
    begun = []

    def fills_up(descriptor: int) -> None:
        begun.append(descriptor)
        if len(begun) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fills_up)
        with pytest.raises(OSError, match="No space left"):
            asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names))
    server.plan(cases)
    asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names))
    check(cases, server, tmp_path / "a")


def test_a_host_has_no_more_in_flight_than_it_may(server, case, make_settings, names, tmp_path):
    urls = server.plan([case("ok_png", number) for number in range(40)], delay_seconds=0.02)
    settings = make_settings(per_host_concurrency=3)
    asyncio.run(download(urls, tmp_path / "a", settings=settings, resolve=names))
    assert server.most_in_flight["ok-png.test"] == 3


def test_a_host_is_asked_no_faster_than_it_may(server, case, make_settings, names, tmp_path):
    urls = server.plan([case("ok_png", number) for number in range(21)])
    begun = time.monotonic()
    settings = make_settings(per_host_per_second=20)
    asyncio.run(download(urls, tmp_path / "a", settings=settings, resolve=names))
    assert time.monotonic() - begun >= 20 / 20


def test_nothing_is_taken_from_the_environment_and_no_cookie_is_kept(
    server, case, make_settings, names, tmp_path, monkeypatch
):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    cases = [dataclasses.replace(case("ok_png", number), send=sets_a_cookie) for number in range(5)]
    settings = make_settings(concurrency=1)
    outcomes = asyncio.run(download(server.plan(cases), tmp_path / "a", settings=settings, resolve=names))
    assert outcomes.counts == {"ok": 5}
    for head in server.heads:
        names_of = {line.partition(":")[0].lower() for line in head.split("\r\n")[1:] if line}
        assert names_of == {"host", "user-agent", "accept", "accept-encoding"}


def test_a_raw_file_that_grew_keeps_its_answers_and_asks_for_what_is_new(server, case, make_settings, names, tmp_path):
    old, new = [case("ok_png"), case("missing"), case("ok_gif")], [case("ok_jpeg"), case("missing", 1)]
    urls = server.plan([*old, *new])
    asyncio.run(download(urls[:3], tmp_path / "a", settings=make_settings(), resolve=names))
    asked = dict(server.seen)
    grown = [urls[3], *urls]  # a line was put in front, and others at the end
    outcomes = asyncio.run(download(grown, tmp_path / "a", settings=make_settings(), resolve=names))
    assert outcomes.counts == {"not_found": 2, "ok": 3}
    assert dict(server.seen) == asked | {one.path: 1 for one in new}
    check([new[0], *old, new[1]], server, tmp_path / "a")
    at_once = tmp_path / "b"
    asyncio.run(download(grown, at_once, settings=make_settings(), resolve=names))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_kill_while_new_urls_are_fetched_loses_no_old_answer(
    server, case, make_settings, names, tmp_path, monkeypatch
):
    cases = [case("ok_png"), case("ok_gif"), case("ok_jpeg")]
    urls = server.plan(cases)
    asyncio.run(download(urls[:2], tmp_path / "a", settings=make_settings(), resolve=names))
    with monkeypatch.context() as killed:
        killed.setattr(run, "write_manifest", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names))
    asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names))
    assert [server.seen[one.path] for one in cases] == [1, 1, 1]
    check(cases, server, tmp_path / "a")


def test_urls_that_are_no_longer_wanted_keep_their_images(server, case, make_settings, names, tmp_path):
    cases = [case("ok_png"), case("ok_gif")]
    urls = server.plan(cases)
    asyncio.run(download(urls, tmp_path / "a", settings=make_settings(), resolve=names))
    before = (tmp_path / "a.tar").read_bytes()
    outcomes = asyncio.run(download(urls[1:], tmp_path / "a", settings=make_settings(), resolve=names))
    assert (outcomes.counts, outcomes.bytes) == ({"ok": 1}, len(cases[1].body))
    assert (tmp_path / "a.tar").read_bytes() == before
    more = server.plan([*cases, case("ok_webp")])
    asyncio.run(download([more[2], more[1]], tmp_path / "a", settings=make_settings(), resolve=names))
    check([case("ok_webp"), cases[1], cases[0]], server, tmp_path / "a")


def test_more_urls_in_flight_than_open_files_is_refused_before_it_begins(make_settings, tmp_path):
    with pytest.raises(ValueError, match="ulimit -n"):
        asyncio.run(download(["http://a.test/"], tmp_path / "a", settings=make_settings(concurrency=10**7)))


@pytest.mark.slow
def test_a_killed_download_asks_nothing_again_that_it_had_written_down(server, plan, make_settings, names, tmp_path):
    cases = [case for case in plan(400) if case.kind not in SLOW]
    cases += [dataclasses.replace(case, number=case.number + 1000) for case in cases if case.kind == "ok_jpeg"]
    urls = server.plan(cases, delay_seconds=0.06)
    settings = make_settings(concurrency=8)
    draw = random.Random(0)
    vouched: dict[str, int] = {}
    journal = tmp_path / "a.journal.jsonl"
    for number in range(KILLS):
        size = _size(journal)
        process = _start(urls, tmp_path / "a", settings)
        while number and _size(journal) <= size:  # but the first, which may die before it has written any
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(draw.uniform(0.05, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
        for line in lines:
            if line.endswith("\n"):
                path = "/" + json.loads(line)["url"].split("/", 3)[3]
                vouched.setdefault(path, server.seen[path])
    assert _start(urls, tmp_path / "a", settings).wait(60) == 0
    assert 0 < len(vouched) < len(cases)
    direct = {path: count for path, count in vouched.items() if not path.startswith("/ok_png/")}
    assert {path: server.seen[path] for path in direct} == direct
    check(cases, server, tmp_path / "a")


def test_mmc4_and_coyo_files_become_a_tar_and_a_manifest_each(server, case, make_settings, tmp_path, monkeypatch):
    cases = [case("ok_png"), case("ok_jpeg"), case("missing")]
    server.plan(cases)
    good, other, lost = (f"http://127.0.0.1:{server.port}{case.path}" for case in cases)
    documents = [{"image_info": [{"raw_url": good}, {"raw_url": lost}]}, {"image_info": [{"raw_url": good}]}]
    for folder in ("mmc4", "coyo"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mmc4/docs_shard_7_v2.jsonl").write_text("\n".join(map(json.dumps, documents)))
    pq.write_table(
        pa.table({"id": [1, 2], "url": [other, None], "text": ["a tree", "a dog"]}),
        tmp_path / "coyo/part-0.snappy.parquet",
    )
    settings, out = make_settings(), tmp_path / "out"
    sources = {kind: guess(str(tmp_path / kind), kind=kind, images=str(out)) for kind in ("mmc4", "coyo")}
    (mmc4,) = download_source(sources["mmc4"], out, settings=settings, cache=tmp_path / "cache")
    (coyo,) = download_source(sources["coyo"], out, settings=settings, cache=tmp_path / "cache")
    assert (mmc4.name, mmc4.counts, mmc4.bytes) == ("docs_shard_7_v2", {"not_found": 1, "ok": 1}, len(cases[0].body))
    assert (coyo.name, coyo.counts, coyo.bytes) == ("part-0.snappy", {"ok": 1}, len(cases[1].body))
    key = hashlib.sha256(good.encode()).hexdigest()[:24]
    assert key_of(good) == key
    with tarfile.open(out / "docs_shard_7_v2.tar") as tar:
        assert tar.getnames() == [f"{key}.png"]
    with pytest.raises(ValueError, match="a folder of their own"):
        download_source(sources["coyo"], tmp_path / "coyo", settings=settings, cache=tmp_path / "cache")
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match="cannot be a folder"):
            download_source(sources["coyo"], place, settings=settings, cache=tmp_path / "cache")


def test_a_download_into_s3_is_that_into_a_folder_and_goes_on_in_the_same_way(
    server, case, make_settings, tmp_path, s3_store
):
    cases = [case("ok_png"), case("ok_jpeg"), case("missing")]
    good, other, lost = (f"http://127.0.0.1:{server.port}{one.path}" for one in cases)
    shard = tmp_path / "mmc4/docs.jsonl"
    shard.parent.mkdir()

    def fetch(out: str):
        source = guess(str(shard.parent), kind="mmc4", images=out)
        return download_source(source, raw_path(out), settings=make_settings(), cache=tmp_path / "cache")

    here, there = str(tmp_path / "out"), f"{s3_store}/images"
    for urls in ([good, lost], [good, lost, other]):
        shard.write_text("".join(json.dumps({"image_info": [{"raw_url": url}]}) + "\n" for url in urls))
        server.plan(cases)
        assert fetch(there) == fetch(here)
        for name in ("docs.tar", "docs.parquet"):
            assert raw_path(f"{there}/{name}").read_bytes() == (tmp_path / "out" / name).read_bytes()
        server.plan(cases)
        fetch(there)
        assert not server.seen
    assert not [path for path in (tmp_path / "cache/downloads").rglob("*") if path.is_file()]


async def sets_a_cookie(writer, case, seen) -> None:
    head = f"HTTP/1.1 200 OK\r\nSet-Cookie: id=1; Path=/\r\nContent-Length: {len(case.body)}\r\n\r\n"
    writer.write(head.encode() + case.body)


def _start(urls: list[str], out: Path, settings) -> subprocess.Popen:
    """The downloader in a process of its own; returns when it begins."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    asked = {"urls": urls, "out": str(out), "settings": settings.model_dump(mode="json")}
    process.stdin.write(json.dumps(asked).encode())
    process.stdin.close()
    assert process.stdout.readline() == b"begins\n"
    return process


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


async def _with_canary(port: int, work) -> int:
    """Connections to the addresses that redirects point to while the work runs."""
    connections = []

    async def caught(reader, writer):
        connections.append(writer.get_extra_info("sockname"))
        writer.close()

    servers = [await asyncio.start_server(caught, "127.0.0.2", port)]
    with contextlib.suppress(OSError):  # a machine without IPv6
        servers.append(await asyncio.start_server(caught, "::1", port))
    await work
    for server in servers:
        server.close()
    return len(connections)
