"""`vila-ops data download` against the faulty server."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from vila_ops.cli import app

KINDS = ("ok_png", "ok_jpeg", "missing", "missing", "failing", "ok_gif")


def test_the_command_tells_what_became_of_the_urls_and_asks_again_what_it_is_told_to(
    server, case, make_settings, tmp_path: Path
) -> None:
    cases = [case(kind, number) for number, kind in enumerate(KINDS)]
    server.plan(cases)
    urls = [f"http://127.0.0.1:{server.port}{one.path}" for one in cases]
    raw, settings = tmp_path / "raw", tmp_path / "settings.yaml"
    raw.mkdir()
    settings.write_text(yaml.safe_dump(make_settings().model_dump(mode="json")))
    for name, some in (("a", urls[:3]), ("b", urls[3:])):
        line = {"text_list": [], "image_info": [{"raw_url": url} for url in some]}
        (raw / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    asked = ("data", "download", "mmc4", str(raw), "--out", str(tmp_path / "out"), "--settings", str(settings))

    done = CliRunner().invoke(app, [*asked, "--attempts", "1"])
    assert done.exit_code == 0, done.output
    sizes = [len(one.body) for one in cases]
    megabytes = (sizes[0] + sizes[1] + sizes[5]) / 1e6
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == [
        "ok 3 50.00%",
        "not_found 2 33.33%",
        "server_error 1 16.67%",
        f"all 6 of 2 raw files, {megabytes:,.1f} MB of images",
    ]
    assert server.seen[cases[4].path] == 1, "--attempts was not heard"

    done = CliRunner().invoke(app, [*asked, "--retry", "not_found", "--retry", "server_error", "--json"])
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"name": "a", "counts": {"not_found": 1, "ok": 2}, "bytes": sizes[0] + sizes[1]},
        {"name": "b", "counts": {"not_found": 1, "ok": 1, "server_error": 1}, "bytes": sizes[5]},
    ]
    assert [server.seen[one.path] for one in cases] == [1, 1, 2, 2, 1 + make_settings().attempts, 1]


def test_a_word_that_is_no_outcome_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["data", "download", "mmc4", ".", "--out", str(tmp_path / "out"), "--retry", "slow"])
    assert isinstance(done.exception, ValueError)
    assert "'not_found'" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["b.tar", "b.tar.partial", "b.parquet", "b.parquet.partial", "b.journal.jsonl", "b.bodies.partial"]
)
def test_a_file_that_no_download_wrote_survives_and_nothing_is_asked(
    name: str, server, case, make_settings, tmp_path: Path
) -> None:
    cases = [case("ok_png", number) for number in range(2)]
    server.plan(cases)
    raw, out, settings = tmp_path / "raw", tmp_path / "out", tmp_path / "settings.yaml"
    raw.mkdir()
    out.mkdir()
    settings.write_text(yaml.safe_dump(make_settings().model_dump(mode="json")))
    for stem, one in zip("ab", cases, strict=True):
        line = {"text_list": [], "image_info": [{"raw_url": f"http://127.0.0.1:{server.port}{one.path}"}]}
        (raw / f"{stem}.jsonl").write_text(json.dumps(line) + "\n")
    if name == "b.parquet":  # as COYO's own files are
        pq.write_table(pa.table({"url": ["http://there/x.png"]}), out / name)
    else:
        (out / name).write_bytes(b"mine")
    before = (out / name).read_bytes()
    asked = ["data", "download", "mmc4", str(raw), "--out", str(out), "--settings", str(settings)]
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, ValueError)
    assert f"{out / name} exists and no download wrote it" in str(done.exception)
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).read_bytes() == before
    assert not any(server.seen[one.path] for one in cases)


def test_rules_of_the_source_select_before_anything_is_fetched(server, case, make_settings, tmp_path: Path) -> None:
    cases = [case("ok_png", number) for number in range(10)]
    server.plan(cases)
    raw, settings = tmp_path / "raw/part-0.parquet", tmp_path / "settings.yaml"
    raw.parent.mkdir()
    settings.write_text(yaml.safe_dump(make_settings().model_dump(mode="json")))
    urls = [f"http://127.0.0.1:{server.port}{one.path}" for one in cases]
    rows = {"url": urls, "text": ["a tree"] * 10, "clip_similarity_vitb32": [n / 8 for n in range(10)]}
    pq.write_table(pa.table(rows), raw)
    rule = "clean.top_share={columns: [clip_similarity_vitb32], share: 0.2}"
    asked = [
        "data",
        "download",
        "coyo",
        str(raw),
        "--out",
        str(tmp_path / "out"),
        "--settings",
        str(settings),
        "--json",
    ]
    done = CliRunner().invoke(app, [*asked, "-s", rule])
    assert done.exit_code == 0, done.output
    assert [server.seen[one.path] for one in cases] == [0] * 8 + [1, 1]
    done = CliRunner().invoke(app, asked)  # all are wanted now
    assert json.loads(done.stdout)["counts"] == {"ok": 10}
    assert [server.seen[one.path] for one in cases] == [1] * 10


def test_a_dry_run_counts_what_would_be_fetched_and_asks_nobody(server, case, make_settings, tmp_path: Path) -> None:
    cases = [case("ok_png", number) for number in range(4)]
    server.plan(cases)
    urls = [f"http://127.0.0.1:{server.port}{one.path}" for one in cases]
    raw, settings, out = tmp_path / "raw.jsonl", tmp_path / "settings.yaml", tmp_path / "out"
    settings.write_text(yaml.safe_dump(make_settings(per_host_per_second=0.5).model_dump(mode="json")))

    def write(some: list[str]) -> None:
        raw.write_text(json.dumps({"text_list": [], "image_info": [{"raw_url": url} for url in some]}) + "\n")

    asked = ["data", "download", "mmc4", str(raw), "--out", str(out), "--settings", str(settings)]
    write([*urls, "ftp://there/x.png"])
    done = CliRunner().invoke(app, [*asked, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == [
        "URLs 5 of 1 raw files",
        "finished before 0",
        "refused 1 without a request",
        "to fetch 4 size not known before the first image; at most 0.2 MB each",
        "about 6 s, if every host answers, by 0.5 URLs of a host a second",
    ]
    assert not out.exists()
    assert not any(server.seen.values())
    settings.write_text(yaml.safe_dump(make_settings().model_dump(mode="json")))
    write(urls[:1])
    assert CliRunner().invoke(app, asked).exit_code == 0
    written = {path: path.read_bytes() for path in out.iterdir()}
    write(urls)
    told = json.loads(CliRunner().invoke(app, [*asked, "--dry-run", "--json"]).stdout)
    size = len(cases[0].body)
    counts = {"urls": 4, "finished": 1, "refused": 0, "to_fetch": 3, "images": 1, "bytes": size}
    assert {name: told[name] for name in counts} == counts
    again = json.loads(CliRunner().invoke(app, [*asked, "--dry-run", "--json", "--retry", "ok"]).stdout)
    assert (again["finished"], again["to_fetch"]) == (0, 4)
    assert {path: path.read_bytes() for path in out.iterdir()} == written
    assert sum(server.seen.values()) == 1
