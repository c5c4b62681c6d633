"""Logs of servers: of bounded size, whole at their end, and read across the files that they are cut into."""

import itertools
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from tests.flows.flow_runs import until
from vila_ops import local
from vila_ops.cli import app
from vila_ops.cli.servers import logs
from vila_ops.config.local import LocalServers
from vila_ops.local.logs import begin, lines_of
from vila_ops.local.process import end, start

LOG_BYTES = 2**16
CHATTY = "for n in range(100_000): print(f'line {n}')\nprint('x' * 50_000)\nprint('the end')"
"""Writes 1.2 MB, a line that is longer than most, and ends."""
LAST_WORDS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended well"))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def settings(tmp_path: Path, free_servers: Callable[[Path], LocalServers]) -> LocalServers:
    return free_servers(tmp_path / "root").with_changes({"log_bytes": LOG_BYTES})


def run(settings: LocalServers, code: str) -> None:
    """Start a server that ends by itself, and wait until its log is written."""
    (Path(settings.root) / "pids").mkdir(parents=True, exist_ok=True)
    record = start(settings, "mlflow", (sys.executable, "-c", code), {}, {})
    assert record.log_writer is not None
    psutil.Process(record.log_writer.pid).wait(600)
    end(settings, record)


def test_a_server_that_writes_more_keeps_five_files_of_bounded_size_and_its_last_words(settings: LocalServers) -> None:
    run(settings, CHATTY)
    folder = Path(settings.root, "logs")
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["mlflow.log", *(f"mlflow.log.{number}" for number in range(1, 5))]
    assert all(file.stat().st_size <= LOG_BYTES for file in files)
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    last = local.last_lines(folder / "mlflow.log", 10_000)
    assert last[-1] == "the end"
    assert "".join(last[-5:-1]) == "x" * 50_000, "a long line is cut, and nothing of it is lost"
    numbers = [int(line.removeprefix("line ")) for line in last[:-5]]
    assert numbers == [*range(100_000 - len(numbers), 100_000)], "no line is lost between two files"
    assert len(numbers) == 9_995


def test_the_log_of_the_process_before_is_kept(settings: LocalServers) -> None:
    run(settings, "print('first')")
    run(settings, "import sys; print('second', flush=True); sys.stderr.write('caf\\xe9\\n')")
    folder = Path(settings.root, "logs")
    assert (folder / "mlflow.log.1").read_text() == "first\n"
    assert (folder / "mlflow.log").read_text() == "second\ncafé\n"
    assert local.last_lines(folder / "mlflow.log", 2) == ["second", "café"]
    assert local.last_lines(folder / "mlflow.log", 9) == ["first", "second", "café"]


def test_what_a_server_says_while_it_ends_is_in_its_log(settings: LocalServers) -> None:
    """Also where its log's writer is asked to end before it."""
    (Path(settings.root) / "pids").mkdir(parents=True)
    record = start(settings, "mlflow", (sys.executable, "-c", LAST_WORDS), {}, {})
    log = Path(settings.root, "logs/mlflow.log")
    until(lambda: log.read_text() == "ready\n")
    assert record.log_writer is not None
    psutil.Process(record.log_writer.pid).terminate()
    end(settings, record)
    assert not record.log_writer.alive()
    assert log.read_text() == "ready\nended well\n"


def test_new_lines_are_followed_from_one_file_into_the_next(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with closing(lines_of(log, last=1)) as lines:
        assert next(lines) is None
        log.write_text("one\ntwo\n")
        assert [next(lines), next(lines)] == ["one", "two"]
        with log.open("a") as file:
            file.write("three\nfo")
            file.flush()
            assert list(itertools.islice(lines, 2)) == [None, "three"]
            assert next(lines) is None
            file.write("ur\n")
        begin(log)
        with log.open("a") as file:
            file.write("five\n")
        assert list(itertools.islice(lines, 4)) == ["four", None, "five", None]
    with closing(lines_of(log, last=3)) as lines:
        assert list(itertools.islice(lines, 4)) == ["three", "four", "five", None]


def test_the_command_prints_the_last_lines_of_each_log(tmp_path: Path, settings: LocalServers) -> None:
    file = tmp_path / "local.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump()))

    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["logs", *words, "--servers", str(file)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    with pytest.raises(ValueError, match="has no log of mlflow, prefect, ray, worker, sweeper; `vila-ops up` starts"):
        said()
    for name in ("ray", "sweeper"):
        begin(Path(settings.root, f"logs/{name}.log"))
        Path(settings.root, f"logs/{name}.log").write_text("".join(f"{name} {n}\n" for n in range(30)))
    assert said("--lines", "2") == "ray     | ray 28\nray     | ray 29\nsweeper | sweeper 28\nsweeper | sweeper 29\n"
    assert said("ray", "-n", "1", "--json") == '{"server": "ray", "line": "ray 29"}\n'
    assert said("ray") == "".join(f"ray {n}\n" for n in range(10, 30))
    with pytest.raises(ValueError, match=r"no server is called 'rai'.*did you mean 'ray'"):
        said("rai")


@pytest.mark.parametrize(
    ("terminal", "no_colour", "shown"),
    [
        (True, "", "\x1b[36m(RayTrainWorker pid=7)\x1b[0m step 1\n"),
        (True, "1", "(RayTrainWorker pid=7) step 1\n"),
        (False, "", "(RayTrainWorker pid=7) step 1\n"),
    ],
)
def test_colours_of_ray_are_for_a_terminal_alone(
    terminal: bool,
    no_colour: str,
    shown: str,
    tmp_path: Path,
    settings: LocalServers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "local.yaml"
    file.write_text(yaml.safe_dump(settings.model_dump()))
    begin(Path(settings.root, "logs/worker.log"))
    Path(settings.root, "logs/worker.log").write_text("\x1b[36m(RayTrainWorker pid=7)\x1b[0m step 1\n")
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    logs(["worker"], servers=file)
    assert capsys.readouterr().out == shown
    logs(["worker"], servers=file, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"server": "worker", "line": "(RayTrainWorker pid=7) step 1"}
