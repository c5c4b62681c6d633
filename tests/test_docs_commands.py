"""The commands of README and docs parse and run, what a page shows is what they print, and named paths exist."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner, Result

from tests.doc_commands import ELSEWHERE, NOT_RUN, RUN, SAMPLE_DATA
from tests.doc_pages import COMMANDS, FENCE, INLINE_CODE, PAGES, PATH, ROOT, blocks, commands_of
from vila_ops.cli import app
from vila_ops.cli.examples import EXAMPLES

OPTION = re.compile(r"--?[a-z][a-z-]*$")
FINGERPRINT = re.compile(r"\b[0-9a-f]{64}\b")
PROGRAM = get_command(app)


def shown_outputs() -> list[tuple[str, str]]:
    """Commands of one line whose output the page shows in the block after them."""
    pair = re.compile(r"^```sh\n([^\n]+)\n```\n+```text\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    pairs = pair.findall("\n".join(PAGES.values()))
    return [(commands_of(command)[0], output) for command, output in pairs]


SHOWN = shown_outputs()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the files that the pages tell the reader to write or to make."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("configs", "store", "data"):
            os.symlink(path, folder / path.name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "mine/images").mkdir(parents=True)
    with (folder / "mine/captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "text"])
        for number in range(3):
            Image.new("RGB", (30, 20), (number * 60, 0, 0)).save(folder / f"mine/images/{number}.png")
            rows.writerow([f"{number}.png", "A red square."])
    for name in ("mine", "chat"):
        done = CliRunner().invoke(app, ["init", str(folder / name)])
        assert done.exit_code == 0, done.output
        for path in (folder / name / "configs").glob(f"*/{name}.yaml"):
            shutil.copy(path, folder / path.relative_to(folder / name))
    return folder


def run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    """A `vila-ops` command of a page, in this process."""
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, shlex.split(command)[1:])


def parse(words: list[str]) -> None:
    """Parse the words after `vila-ops` as the program does, without running anything. Raises click's usage errors."""
    command, context, name = PROGRAM, None, "vila-ops"
    while isinstance(command, TyperGroup):
        context = command.make_context(name, list(words), parent=context)
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
    command.make_context(name, list(words), parent=context)


def test_every_block_names_its_language() -> None:
    """So that none of the commands escapes the tests below."""
    for page, text in PAGES.items():
        assert text.count("\n```") % 2 == 0, page
        languages = {name for name, _ in FENCE.findall(text)}
        assert languages <= {"sh", "text", "yaml", "json", "python", "toml"}, page


def test_commands_are_in_blocks_of_commands() -> None:
    """So that none escapes in a block of another language."""
    program = re.compile(
        r"^(?:vila-ops|make|curl|pip|uv|prefect|dvc|git|kubectl|helm|docker|export|sbatch) ", re.MULTILINE
    )
    for language in ("text", "yaml", "json", "python", "toml"):
        for page, block in blocks(language):
            assert not program.findall(block), f"{page}: {block}"


def test_every_command_is_run_or_says_why_not() -> None:
    excused = [command for commands in NOT_RUN.values() for command in commands]
    listed = {*RUN, *excused, *(command for command, _ in SHOWN)}
    assert {one for one in COMMANDS if not one.startswith(ELSEWHERE)} - listed == set(), (
        "add these to RUN, or to NOT_RUN with the reason"
    )
    assert listed - set(COMMANDS) == set(), "no page has these any more"


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith("vila-ops ") and "--help" not in one])
def test_a_command_parses(command: str) -> None:
    parse(shlex.split(command.partition(" > ")[0])[1:])


@pytest.mark.parametrize("words", [["frobnicate"], ["show"], ["show", "a.yaml", "--colour"], ["data", "lint"]])
def test_the_parser_of_these_tests_refuses_what_the_program_refuses(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such|Missing"):
        parse(words)


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(command, workspace, monkeypatch)
    if command == "vila-ops doctor":  # whether it finds anything depends on the machine
        assert "Python 3.11" in result.output
    else:
        assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_shown_output_is_printed(command: str, output: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints apart, which change with every field of a config class."""
    printed, shown = (
        [FINGERPRINT.sub("", line).rstrip() for line in text.splitlines()]
        for text in (run(command, workspace, monkeypatch).output, output)
    )
    assert printed == shown


def test_prose_names_commands_and_options_that_exist() -> None:
    """`vila-ops` commands in the running text; their arguments may be placeholders."""
    for page, text in PAGES.items():
        for code in INLINE_CODE.findall(FENCE.sub("", text)):
            if not code.startswith("vila-ops "):
                continue
            command, words = PROGRAM, code.split()[1:]
            while isinstance(command, TyperGroup) and words and words[0] in command.commands:
                command, words = command.commands[words[0]], words[1:]
            if command.name == "train":
                command = command.commands["stage"]
            assert not isinstance(command, TyperGroup) or all(map(OPTION.match, words)), f"{page}: {code}"
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            assert {word for word in words if OPTION.match(word)} <= known, f"{page}: {code}"


@pytest.mark.parametrize("example", EXAMPLES.values())
def test_the_example_of_a_command_parses(example: str) -> None:
    parse(shlex.split(example))


def test_tests_that_run_commands_exist() -> None:
    for reason in NOT_RUN:
        assert all((ROOT / path).exists() for path in PATH.findall(reason)), reason


def test_a_test_that_is_said_to_run_a_command_names_it() -> None:
    """Itself, or by the page that it follows."""
    for reason, commands in NOT_RUN.items():
        if not reason.startswith("is run by ") or "by its function" in reason:
            continue
        places = [ROOT / path for path in PATH.findall(reason)]
        files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))]
        text = "\n".join(file.read_text() for file in files)
        text += "".join(content for page, content in PAGES.items() if page in text)
        for line in commands:
            if line.startswith("vila-ops "):
                command, words = PROGRAM, line.split()[1:]
                while isinstance(command, TyperGroup) and words[0] in command.commands:
                    command, words = command.commands[words[0]], words[1:]
                named = rf"[\"']{command.name}[\"' ]|vila-ops [a-z -]*\b{command.name}\b"
                assert re.search(named, text), f"{reason}: {line}"


def test_every_command_is_described() -> None:
    def names(group: TyperGroup, prefix: str) -> Iterator[str]:
        for name, command in group.commands.items():
            is_group = isinstance(command, TyperGroup) and name != "train"
            yield from names(command, f"{prefix} {name}") if is_group else [f"`{prefix} {name}`"]

    assert {name for name in names(PROGRAM, "vila-ops") if name not in PAGES["docs/commands.md"]} == set()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page, text in PAGES.items():
        named = [*COMMANDS, *INLINE_CODE.findall(FENCE.sub("", text))]
        assert {words[5:].split()[0] for words in named if words.startswith("make ")} <= targets, page
        for name in re.findall(r"\bNAME=(\w+)", text):
            assert (ROOT / "benchmarks" / f"{name}.py").is_file(), page


def test_the_tutorial_has_data_for_a_reader_without(tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    subprocess.run(["sh", "-ec", "\n".join(SAMPLE_DATA)], cwd=tmp_path, check=True)
    words = ["data", "lint", str(tmp_path / "mine/captions.csv"), "--images", str(tmp_path / "mine/images"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["records"] == 48


def test_paths_exist(workspace: Path) -> None:
    for page, text in PAGES.items():
        missing = [path for path in PATH.findall(text) if not (workspace / path).exists()]
        assert not missing, page
