"""README and docs: commands parse and run, paths and links exist, and printed output is what the commands print."""

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
import yaml
from PIL import Image
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner, Result

from vila_ops.cli import app
from vila_ops.cli.examples import EXAMPLES

ROOT = Path(__file__).parents[1]
PAGES = {str(file.relative_to(ROOT)): file.read_text() for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"(?<![\w/.-])(?:configs|flows|vila_ops|infra|tests|benchmarks|docs)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"--?[a-z][a-z-]*$")
FINGERPRINT = re.compile(r"\b[0-9a-f]{64}\b")

QUESTION = next(line for line in PAGES["docs/your-data.md"].splitlines() if line.startswith("printf "))
"""The command that writes the question for curl."""
SAMPLE_DATA = tuple(
    line for line in PAGES["docs/tutorial.md"].splitlines() if line.startswith(("mkdir mine ", "(echo image,text"))
)
"""The commands by which a reader without data makes some."""
RUN = (
    "vila-ops --help",
    "vila-ops doctor",
    "vila-ops benchmark list",
    "vila-ops benchmark get mmmu --dry-run",
    "vila-ops show demo",
    "vila-ops show vila-7b -r vila_128",
    "vila-ops show configs/recipes/mine.yaml",
    "vila-ops show configs/recipes/vila-7b.yaml -r configs/resources/vila_128.yaml",
)
"""Run by `test_a_command_runs`; those whose output a page shows are run by `test_shown_output_is_printed`."""
ELSEWHERE = ("kubectl ", "helm ", "psql ", "docker ", "sbatch ")
"""Commands that need a Kubernetes cluster, Docker or Slurm; tests/infra checks what they would be given."""
NOT_RUN = {
    "starts servers or talks to them": (
        "make up",
        "vila-ops run configs/recipes/tiny.yaml -r configs/resources/laptop.yaml",
        "make down",
        "make status",
        "make logs",
        "vila-ops up",
        "vila-ops status",
        "vila-ops logs",
        "vila-ops logs worker ray --lines 100 --follow",
        "vila-ops logs worker --follow",
        "vila-ops down",
        "prefect deployment run vila/full-pipeline --param recipe=mine --param resources=inline",
        "prefect deployment run vila/full-pipeline --param recipe=demo",
        "prefect deployment run vila/full-pipeline --param recipe=/data/own.yaml --param resources=/data/cluster.yaml",
        "prefect deployment run vila-release/promote --param recipe=demo --param approval=true",
        "vila-ops deploy configs/recipes/demo.yaml -r configs/resources/laptop.yaml",
        "vila-ops undeploy configs/recipes/demo.yaml -r configs/resources/laptop.yaml",
        "export VILA_API_KEY=$(vila-ops keys create keys.json deploy)",
        "vila-ops deploy configs/recipes/mine.yaml -r protected.yaml",
        'curl -s http://127.0.0.1:8000/v1/models -H "Authorization: Bearer $VILA_API_KEY"',
        "vila-ops register configs/recipes/mine.yaml -r protected.yaml",
        "vila-ops canary configs/recipes/mine.yaml --version 2 --share 0.1 -r protected.yaml",
        "vila-ops promote configs/recipes/mine.yaml -r protected.yaml",
        "vila-ops canary configs/recipes/mine.yaml --version 4 --share 0.1",
        "vila-ops promote configs/recipes/mine.yaml",
        "vila-ops rollback configs/recipes/mine.yaml",
        "curl -s http://127.0.0.1:8000/v1/models",
        "curl -s http://127.0.0.1:8000/v1/feedback -H 'Content-Type: application/json' -d @feedback.json",
        "curl -sN http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d @stream.json",
    ),
    "is run by tests/model/test_gguf.py by its function, and llama.cpp is not installed": (
        "vila-ops export CHECKPOINT --to gguf --weights q8_0 --out model-gguf",
        'llama-mtmd-cli -m model-gguf/model.gguf --mmproj model-gguf/mmproj.gguf --image photo.png -p "What is this?"',
    ),
    "is run by tests/serve/app/test_access.py, on a file of its own": (
        "vila-ops keys create keys.json deploy",
        "vila-ops keys create keys.json Ann --days 90 --requests-per-minute 60 --tokens-per-minute 20000 "
        "--max-concurrent 4",
        "vila-ops keys create keys.json prometheus --scope metrics",
        "vila-ops keys list keys.json",
        "vila-ops keys rotate keys.json ID --grace-hours 24",
        "vila-ops keys revoke keys.json ID",
        "vila-ops keys audit keys.json.audit.jsonl",
    ),
    "is run by tests/registry/test_register.py, on a model of its own": (
        "vila-ops champion vila-demo -r configs/resources/laptop.yaml",
        'vila-ops champion vila-demo -r configs/resources/laptop.yaml --back --reason "answers in the wrong language"',
        'vila-ops champion vila-demo -r configs/resources/laptop.yaml --version 4 --reason "the gate was too strict"',
    ),
    "is run by tests/retrain, on a store of its own": (
        "mkdir -p inbox/photos",
        "vila-ops retrain configs/recipes/demo.yaml --policy configs/retrain/demo.yaml -r "
        "configs/resources/laptop.yaml --dry-run",
    ),
    "is run by tests/monitoring, on a store of its own": (
        "vila-ops top -r configs/resources/laptop.yaml",
        "vila-ops top -r configs/resources/laptop.yaml --once",
        "vila-ops metrics -r configs/resources/laptop.yaml",
        "vila-ops metrics -r configs/resources/laptop.yaml --listen 127.0.0.1:9464",
        "vila-ops metrics -r configs/resources/laptop.yaml --out /var/lib/node_exporter/vila.prom",
    ),
    "is run by tests/lineage, on a store of its own": (
        "vila-ops trace vila-demo@champion -r configs/resources/laptop.yaml",
        "vila-ops gc -r configs/resources/laptop.yaml --keep configs/recipes/demo.yaml",
        "vila-ops gc -r configs/resources/laptop.yaml --keep configs/recipes/demo.yaml --delete",
    ),
    "is run by tests/data/test_takedown.py, on the tiny recipe": (
        "vila-ops data remove configs/recipes/mine.yaml --mixture mine -r configs/resources/inline.yaml --id 0001.jpg",
    ),
    "sets variables or writes files for a command that needs a Kubernetes cluster": (
        "driver=$(kubectl -n vila get pod -l app.kubernetes.io/component=driver -o name)",
        "token=$(openssl rand -hex 32); mlflow=$(openssl rand -hex 16); prefect=admin:$(openssl rand -hex 16)",
        "postgres=$(openssl rand -hex 16); session=$(openssl rand -hex 32); "
        "databases=postgresql://vila:$postgres@postgres:5432",
        'umask 077; cd "$(mktemp -d)"',
        r"printf '[mlflow]\ndefault_permission = READ\nadmin_username = admin\ndatabase_uri = %s\n' "
        "$databases/mlflow_auth > auth.ini",
        "echo 'authorization_function = mlflow.server.auth:authenticate_request_basic_auth' >> auth.ini",
        "rm auth.ini keys.json; cd -",
    ),
    "needs a GPU": ("make gpu",),
    "is run by tests/infra/test_release.py, check by check": ("make release",),
    "fetches packages or images, or reads a model that has to be downloaded": (
        "vila-ops benchmark get mmmu",
        "vila-ops benchmark check",
        "make setup",
        "vila-ops fetch configs/recipes/demo.yaml",
        "vila-ops fetch configs/recipes/demo.yaml -r configs/resources/slurm.yaml",
        "vila-ops prepare configs/recipes/demo.yaml --mixture align",
        "vila-ops data show configs/recipes/demo.yaml --mixture align --out samples.html",
        "vila-ops data download mmc4 raw/mmc4 --out raw/mmc4_images",
        "vila-ops data download coyo raw/coyo --out raw/coyo_images",
        "vila-ops data download coyo raw/coyo --out raw/coyo_images -s 'clean.top_share={columns: "
        "[clip_similarity_vitb32, clip_similarity_vitl14], share: 0.2, above: 0.6}'",
        "vila-ops import VILA1.5-3b --out models/vila15-3b > model.yaml",
        "vila-ops import VILA1.5-3b --out models/vila15-3b --json",
        "vila-ops import NVILA-Lite-8B --out models/nvila-lite --chat-template chatml",
        "vila-ops import llava-1.5-7b-hf --out models/llava --chat-template vicuna_v1",
    ),
    "is run by tests/data/sources/test_on_s3.py and tests/data/download, on a store of their own": (
        "vila-ops data lint s3://team-data/kettles/captions.csv --images s3://team-data/kettles/images",
        "vila-ops data download mmc4 s3://team-data/mmc4 --out s3://team-data/mmc4_images",
    ),
    "fetches a program, and lists what is installed": ("make sbom",),
    "is run by tests/cli/test_manners.py on the tiny recipe": (
        "vila-ops train configs/recipes/mine.yaml --stage sft --dry-run",
    ),
    "changes this checkout": ("git pull",),
    "changes the reader's shell": ('export PATH="$PWD/.venv/bin:$PATH"', "cd .."),
    "is run by tests/test_docs.py::test_the_tutorial_has_data_for_a_reader_without": SAMPLE_DATA,
    "collects packages on a machine with a network, and installs them on one without": (
        "uv build --wheel",
        "DS_BUILD_OPS=0 pip wheel --wheel-dir wheels --constraint constraints.txt dist/vila_ops-*.whl",
        "tar -cf vila-ops.tar wheels configs data/benchmarks -C ~ .cache/vila-ops .cache/huggingface",
        "tar -xf vila-ops.tar && cp -r .cache ~",
        "pip install --no-index --find-links wheels vila-ops",
        "export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1",
    ),
    "installs packages": (
        "pip install git+URL",
        'pip install "vila-ops[gpu,qlora] @ git+URL"',
        "pip install --constraint constraints.txt git+URL",
    ),
    "is run by tests/test_backup.py and tests/flows/test_full_pipeline.py, on folders of their own": (
        "vila-ops backup /backups/vila -r laptop",
        "vila-ops restore /backups/vila -r laptop",
    ),
    "is run by tests/plan/test_shipped.py by its function": ("vila-ops plan vila-7b -r vila_128 --lengths vila",),
    "is run by tests/ablate, with one step a stage": ("vila-ops ablate tiny", "vila-ops ablate tiny --dry-run"),
    "is run by tests/ablate by its function": ("vila-ops ablate table1_demo --dry-run --lengths demo",),
    "is run by tests/ablate/test_cost.py, with two of the grids and a store of its own": (
        "vila-ops ablate configs/grids/*_demo.yaml --results docs/findings/results --dry-run",
    ),
    "takes hours": (
        "vila-ops ablate pilot --results pilot",
        "vila-ops ablate table1_demo --page table1.html",
        "vila-ops ablate configs/grids/*_demo.yaml --results docs/findings/results",
    ),
    "takes minutes": (
        "make demo",
        "make test",
        "make bench NAME=packing",
        "VILA_BENCH_SMALL=1 make gpu",
        "vila-ops train configs/recipes/tiny.yaml --stage pretrain --profile 3",
        "vila-ops train configs/recipes/demo.yaml --stage align",
        "vila-ops train verify-resume configs/recipes/tiny.yaml --kills 5",
        "vila-ops evaluate configs/recipes/demo.yaml --stage align",
        "vila-ops evaluate demo_known --stage sft",
        "vila-ops evaluate configs/recipes/demo.yaml --stage sft --final",
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --final -s final_suite.precision=int8",
        "vila-ops alignment configs/recipes/demo.yaml --out alignment.svg",
    ),
    "is run by tests/test_cli.py": (
        "vila-ops run configs/recipes/tiny.yaml",
        "vila-ops explain configs/recipes/tiny.yaml -s stages.sft.learning_rate=1e-4",
        "vila-ops explain configs/recipes/mine.yaml -s stages.sft.learning_rate=1e-4",
        "vila-ops explain configs/recipes/tiny.yaml",
        "vila-ops report configs/recipes/tiny.yaml",
    ),
    "is run by tests/test_your_data.py, with a small model": (
        "vila-ops data lint mine/captions.csv --images mine/images",
        "vila-ops init mine --data mine/captions.csv --images mine/images",
        "cd mine",
        "vila-ops prepare configs/recipes/mine.yaml --mixture mine",
        "vila-ops data show configs/recipes/mine.yaml --mixture mine --out samples.html",
        "vila-ops train configs/recipes/mine.yaml --stage sft",
        "vila-ops evaluate configs/recipes/mine.yaml --stage sft --final",
        'vila-ops generate store/checkpoint/ADDRESS --image images/0001.jpg "What is this?"',
        "vila-ops export store/checkpoint/ADDRESS --out model",
        "vila-ops deploy configs/recipes/mine.yaml",
        QUESTION,
        "curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d @question.json",
        "vila-ops undeploy configs/recipes/mine.yaml",
        "vila-ops data lint chat/llava.json --images chat/images",
        "vila-ops init chat --data chat/llava.json --images chat/images",
        "cd chat",
        "vila-ops train configs/recipes/chat.yaml --stage sft",
        "vila-ops evaluate configs/recipes/chat.yaml --stage sft --final",
    ),
    "is run by tests/eval/test_official_suite.py": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --suite configs/suites/sample.yaml -s "
        "resources.storage.benchmarks=docs/samples",
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --suite configs/suites/sample.yaml -s "
        "resources.storage.benchmarks=docs/samples --out evaluation.html",
        "vila-ops evaluate configs/recipes/tiny.yaml --stage align --suite configs/suites/sample.yaml -s "
        "resources.storage.benchmarks=docs/samples",
    ),
    "is run by tests/eval/test_endpoint_target.py, against an endpoint of its own": (
        "vila-ops evaluate configs/suites/sample.yaml --endpoint vila@http://127.0.0.1:8000/v1 -s "
        "resources.storage.benchmarks=docs/samples",
    ),
    "is run by tests/test_cli.py, after the recipe": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --final",
        "vila-ops evaluate configs/recipes/tiny.yaml --stage align --final",
    ),
    "is run by tests/eval/test_few_shot_suite.py": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage base --suite configs/suites/sample_few_shot.yaml -s "
        "resources.storage.benchmarks=docs/samples",
    ),
    "is run by tests/eval/test_in_training.py": (
        "vila-ops evaluate configs/recipes/tiny.yaml --stage align --every 2",
    ),
    "is run by tests/plan/test_shipped.py": (
        "vila-ops plan configs/recipes/vila-7b-packed.yaml -r configs/resources/eight_gpus.yaml "
        "--lengths configs/lengths/vila.yaml",
    ),
    "is run by tests/config/test_settings_page.py, with a small model": (
        "vila-ops train configs/recipes/mine.yaml --stage align",
    ),
    "needs an artifact, a file of a stopped stage, or placeholders filled in": (
        "vila-ops data quarantine configs/recipes/mine.yaml -r configs/resources/inline.yaml --from "
        "store/diagnostics/ADDRESS/bad-samples-step-000012.json",
        "vila-ops train RECIPE --stage pretrain --json",
        "export OPENAI_API_KEY=KEY",
        "vila-ops compare store/report/BEFORE store/report/AFTER",
        "vila-ops compare models:/mine/3 mine@champion configs/recipes/mine.yaml -r configs/resources/laptop.yaml",
        "vila-ops compare store/report/BASE store/report/ALIGN --metric pope_f1_official --metric gqa_official "
        "--slices",
        "vila-ops export store/checkpoint/BASE --out base",
        "vila-ops export store/checkpoint/TUNED --out tuned",
    ),
    "works on a git checkout with DVC; tests/test_dvc.py runs the same": (
        "dvc repro prepare@mine",
        "dvc pull data/mine",
        'git add .gitignore prefect.toml configs dvc.yaml dvc.lock data && git commit -m "Data: first revision"',
        "dvc metrics diff",
        "dvc plots diff",
        "dvc diff",
        "dvc pull data/mine",
        "git diff data/mine.md",
        "dvc remote add --default team s3://team-data/dvc",
        'git add .dvc/config && git commit -m "A remote for data"',
        "dvc push",
        "vila-ops data watch configs/recipes/mine.yaml --mixture mine --commit",
    ),
}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Each page and the content of its fenced blocks in a language."""
    for page, text in PAGES.items():
        for name, content in FENCE.findall(text):
            if name == language:
                yield page, content


def commands_of(block: str) -> list[str]:
    """The lines of a block without their comments and their alignment."""
    joined = block.replace("\\\n", " ")
    lines = (re.sub(r"\s#.*$", "", line).strip() for line in joined.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def shown_outputs() -> list[tuple[str, str]]:
    """Commands of one line whose output the page shows in the block after them."""
    pair = re.compile(r"^```sh\n([^\n]+)\n```\n+```text\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
    pairs = pair.findall("\n".join(PAGES.values()))
    return [(commands_of(command)[0], output) for command, output in pairs]


PROGRAM = get_command(app)
COMMANDS = list(dict.fromkeys(command for _, block in blocks("sh") for command in commands_of(block)))
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


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


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


def test_links_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for link in LINK.findall(FENCE.sub("", text)):
            if link.startswith("https://"):
                continue
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target.read_text()), f"{page}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(LINK.findall(PAGES["README.md"]))
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r"^   (\S+)$", (ROOT / "docs/index.rst").read_text(), flags=re.MULTILINE)
    docs = ROOT / "docs"
    paths = [
        path for pattern in ("*.md", "*.rst", "*/README.md", "findings/*/README.md") for path in docs.glob(pattern)
    ]
    assert sorted([*listed, "index"]) == sorted(path.relative_to(docs).with_suffix("").as_posix() for path in paths)


def test_yaml_blocks_are_yaml() -> None:
    for page, block in blocks("yaml"):
        assert yaml.safe_load(block), page


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_the_readme_lists_the_package_as_it_is() -> None:
    tree = next(block for page, block in blocks("text") if page == "README.md")
    listed = set(re.findall(r"^  (\w+(?:/|\.py)) ", tree.partition("vila_ops/\n")[2], flags=re.MULTILINE))
    parts = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "vila_ops").iterdir()}
    assert listed == {part for part in parts if not part.startswith("__")}
    for top in re.findall(r"^(\w[\w.]*/?)", tree, flags=re.MULTILINE):
        assert (ROOT / top).exists(), top
