"""What a user reads after a mistake: one line for each, with the nearest name, and no traceback."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_ops import __version__
from vila_ops.cli import main, messages

ROOT = Path(__file__).parents[2]
TINY = "configs/recipes/tiny.yaml"
INLINE = "configs/resources/inline.yaml"
Tell = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tell:
    """The lines on standard error of a command that fails."""

    def run(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["vila-ops", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code not in (0, None)
        shown = capsys.readouterr()
        assert shown.out == ""
        return shown.err.splitlines()

    return run


SETTINGS = {
    "stages.sft.learning_rat=1": "sft.learning_rat: there is no such setting; HELP; did you mean 'learning_rate'?",
    "stages.sft.mixture.sources.pairs.pth=x": "sources.pairs.pth: there is no such setting; HELP; did you mean 'path'?",
    "resources.micro_batch_size=2": "did you mean resources.train.micro_batch_size or resources.train.stages.NAME.m",
    "resources.train.zero_stages=2": "zero_stages: there is no such setting; HELP; did you mean 'zero_stage'?",
    "learning_rate=1e-5": "learning_rate: there is no such setting; HELP; did you mean stages.NAME.learning_rate?",
    "stages.sft.num-steps=3": "stages.sft.num-steps: there is no such setting; HELP; did you mean 'num_steps'?",
    "gate.rules=[{metric: text_los, at_most: 9}]": "its benchmarks are ['caption_loss'",
    "train.num_workers=2": "no key 'train'; keys here are ['final_suite'",
    "stages.stf.learning_rate=1": "did you mean 'sft'?",
    "stages.sft.tuning.kind=lorra": "no kind 'lorra'; it may be 'full', 'lora', 'visual_expert'; did you mean 'lora'?",
    "model.projector={kind: mpl_gelu}": "no vila_ops.projectors of kind 'mpl_gelu'",
    "stages.sft.precision=bf61": "precision: it is 'bf61', but may be 'fp32' or 'bf16'; did you mean 'bf16'?",
    "model.chat_template=vicuna": "model.chat_template: there is no chat template 'vicuna'; it may be chatml, hermes_2",
    "stages.sft.num_steps=0": "stages.sft.num_steps: Input should be greater than 0; it is 0",
    "model.vision_tower={architecture: clip}": "model.vision_tower: a mapping with a `kind` is wanted here",
}
"""What is said of an override; HELP names the page with all settings."""


@pytest.mark.parametrize("override", SETTINGS)
def test_a_wrong_setting_is_one_line_with_the_nearest_name(override: str, told: Tell) -> None:
    lines = told("show", TINY, "-s", override)
    assert len(lines) == 1
    assert SETTINGS[override].replace("HELP", "docs/settings.md lists them") in lines[0]


def test_a_setting_of_the_resources_is_told_with_its_prefix(told: Tell) -> None:
    assert "did you mean resources.train.num_workers=2?" in told("show", TINY, "-s", "train.num_workers=2")[0]


FILES = {
    (
        "show",
        TINY,
        "-r",
        TINY,
    ): f"{TINY} does not hold resources (configs/resources): it lacks launch, and its keys ",
    ("show", TINY, "-r", "configs/local.yaml"): "configs/local.yaml does not hold resources",
    ("show", INLINE): f"{INLINE} does not hold a recipe (configs/recipes): it lacks name, model",
    ("show", "configs/mixtures/align.yaml"): "configs/mixtures/align.yaml does not hold a recipe",
    ("show", "configs/recipes/tiney.yaml"): "no such config file: ",
    ("status", "--servers", INLINE): f"{INLINE} does not hold servers (configs): its keys are launch",
    ("plan", TINY, "--lengths", INLINE): f"{INLINE} does not hold lengths of samples (configs/lengths)",
}


@pytest.mark.parametrize("words", FILES, ids=" ".join)
def test_a_file_of_another_kind_is_one_sentence(words: tuple[str, ...], told: Tell) -> None:
    lines = told(*words)
    assert len(lines) == 1
    assert FILES[words] in lines[0]


def test_a_file_that_is_not_there_is_told_with_the_nearest_one(told: Tell) -> None:
    assert told("show", "configs/recipes/tiny.yml")[0].endswith("; did you mean 'tiny.yaml'?")


NAMES = {
    (
        "train",
        TINY,
        "--stage",
        "stf",
    ): "it has ['base', 'align', 'pretrain', 'sft']; did you mean 'sft'?",
    ("evaluate", TINY, "--stage", "pretain"): "did you mean 'pretrain'?",
    ("prepare", TINY, "--mixture", "tiny_aling"): "did you mean 'tiny_align'?",
    ("shwo", TINY): "Did you mean 'show'?",
    ("data", "lnt", "x"): "Did you mean 'lint'?",
    ("show", TINY, "--ful"): "--full",
}


@pytest.mark.parametrize("words", NAMES, ids=" ".join)
def test_a_wrong_name_of_a_stage_a_mixture_or_a_command_is_told_with_the_nearest(
    words: tuple[str, ...], told: Tell
) -> None:
    assert NAMES[words] in " ".join(told(*words)).replace("│", "")


def test_a_folder_of_images_that_is_not_there_is_one_line_and_not_one_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "".join(f"{number}.png,A square.\n" for number in range(50))
    (tmp_path / "captions.csv").write_text(f"image,text\n{rows}")
    monkeypatch.setattr(sys, "argv", ["vila-ops", "data", "lint", str(tmp_path / "captions.csv"), "--images", "nope"])
    with pytest.raises(SystemExit):
        main()
    fault, counts, reason = capsys.readouterr().out.splitlines()
    assert "no such folder: nope" in fault
    assert counts == "0 records, 0 images, 1 fault"
    assert reason.split() == ["1", "not_readable"]


def test_a_log_has_no_bars_of_the_libraries() -> None:
    script = (
        "import sys; from vila_ops.cli import main\n"
        "sys.argv = ['vila-ops', '--version']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "from huggingface_hub.utils import are_progress_bars_disabled\n"
        "print(are_progress_bars_disabled())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vila-ops", "--version"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"vila-ops {__version__}\n"


def test_an_error_that_is_ours_keeps_its_traceback_in_a_file(
    told: Tell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("vila_ops.config.load", broken)
    monkeypatch.setattr(messages.tempfile, "tempdir", str(tmp_path))
    (line,) = told("show", TINY)
    (kept,) = tmp_path.iterdir()
    assert line == f"error: KeyError: 'lost'. This is a fault of vila-ops; {kept} says where it happened"
    assert 'raise KeyError("lost")' in kept.read_text()


def test_an_error_of_the_system_names_the_path() -> None:
    with pytest.raises(OSError, match="nope") as raised:
        Path("/proc/nope/file").read_text()
    assert messages.message_of(raised.value) == "/proc/nope/file: No such file or directory"


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The signal arrives while the command works, in a process that a shell may have told to ignore it."""
    words = ["show", TINY, "-s", "name=a b"]

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("vila_ops.config.load", interrupted)
    monkeypatch.setattr(sys, "argv", ["vila-ops", *words])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted; what was finished is kept, and the same command goes on: vila-ops show {TINY} -s 'name=a b'"
    )
