"""The script for Slurm, with stand-ins for Slurm's own commands, which are not here."""

import os
import subprocess
from pathlib import Path

import pytest

from vila_ops.config import load

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra/slurm/ray.sbatch"
COMMAND = ("vila-ops", "train", "a recipe.yaml", "--stage", "sft")
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$SEEN/arguments"
stat --format=%a "$RAY_AUTH_TOKEN_PATH" > "$SEEN/mode"
cat "$RAY_AUTH_TOKEN_PATH" > "$SEEN/token"
echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN_PATH" > "$SEEN/auth"
exit 3
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What Slurm sets in a job of two nodes, whose first is this machine."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\necho another\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "localhost,another", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "96", "SLURM_GPUS_ON_NODE": "8"}
    return {**job, "SEEN": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_each_node_starts_ray_and_the_first_the_command_with_its_address(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *COMMAND], env=environment)
    assert done.returncode == 3, "as srun ended, so that Slurm sees a failed job"
    arguments = (tmp_path / "arguments").read_text().splitlines()
    before, after = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    assert before[1:] == [
        *("ray", "symmetric-run", "--address", "127.0.0.1:23456", "--min-nodes", "2"),
        *("--num-cpus", "96", "--num-gpus", "8"),
    ]
    assert after == [*COMMAND, "-s", "resources.ray_address=127.0.0.1:23456"]


def test_the_token_is_a_file_of_this_user_which_is_gone_after_the_job(
    environment: dict[str, str], tmp_path: Path
) -> None:
    tokens = set()
    for _ in range(2):
        subprocess.run(["bash", str(SCRIPT), *COMMAND], env=environment)
        mode, path = (tmp_path / "auth").read_text().split()
        assert (mode, (tmp_path / "mode").read_text()) == ("token", "600\n")
        assert not Path(path).exists()
        tokens.add((tmp_path / "token").read_text())
    assert len(tokens) == 2
    assert {len(token) for token in tokens} == {64}


def test_without_a_command_it_says_what_to_give(environment: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert (done.returncode, "give the command" in done.stderr) == (2, True)


def test_the_resources_are_those_of_the_job_that_the_script_asks_for() -> None:
    asked = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in SCRIPT.read_text().splitlines()
        if "=" in line and line.startswith("#SBATCH")
    )
    train = load(ROOT / "configs/recipes/vila-7b.yaml", resources=ROOT / "configs/resources/slurm.yaml").resources.train
    assert train.num_workers == int(asked["nodes"]) * int(asked["gpus-per-node"])
    assert train.cpus_per_worker * int(asked["gpus-per-node"]) <= int(asked["cpus-per-task"])
