"""An engine that a third-party package adds by an entry point, in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vila_ops.config import Resources

PLUGIN = '''
from typing import Literal

from vila_ops.config import Config as Base
from vila_ops.generate.request import Delta

REVISION = 4


class Config(Base):
    kind: Literal["count"] = "count"
    step: int = 1


def open_engine(config, folder, options):
    return Counting(config.step, (folder / "first.txt").read_text())


class Counting:
    """Counts up from a number in the model folder; stops at a stop token."""

    def __init__(self, step, first):
        self.step, self.first = step, int(first)

    async def generate(self, prompt, sampling, request_id):
        for number in range(sampling.max_new_tokens):
            token = self.first + len(prompt.input_ids) + number * self.step
            if token in sampling.stop_ids:
                yield Delta([], "stop")
                return
            yield Delta([token])
        yield Delta([], "length")
'''
USE = """
import json, sys
from pathlib import Path
from vila_ops.artifacts.kinds import Checkpoint, Dataset, ModelVersion
from vila_ops.config import Resources, Service
from vila_ops.eval.job import EvalJob
from vila_ops.generate.engine import EngineOptions, generate_all
from vila_ops.generate.load import engine_facts, open_folder
from vila_ops.generate.request import Prompt, Sampling
from vila_ops.serve.spec import Spec

resources = Resources.model_validate_json(sys.argv[1])
resources = Resources.model_validate_json(resources.model_dump_json())  # as between processes
engine = open_folder(Path(sys.argv[2]), resources.evaluate.engine, EngineOptions(Path(sys.argv[2])))
outputs = generate_all(engine, [Prompt([7]), Prompt([7, 7])], Sampling(3, frozenset({106})))
checkpoint = Checkpoint(uri="s3://b/c", digest="d", parents=(), stage="sft", step=1)
version = ModelVersion(name="m", version=1, checkpoint=checkpoint, promoted=False)
assert "torch" not in sys.modules
chosen = resources.evaluate.engine.model_dump()
mixture = {"name": "m", "sources": {"a": {"kind": "jsonl", "path": "x", "render": "caption"}}}
suite = {"name": "s", "mixture": mixture, "split": "test", "benchmarks": {"words": {"kind": "caption_loss"}}}
data = Dataset(uri="s3://b/d", digest="d", num_samples=1, num_tokens=1)


def job(engine):
    here = {"launch": "inline", "evaluate": {"engine": engine}} if engine else {"launch": "inline"}
    return EvalJob(suite=suite, model=checkpoint, data=data, resources=Resources.model_validate(here))


print(json.dumps({
    "outputs": [[output.ids, output.finish_reason] for output in outputs],
    "facts": engine_facts(resources.evaluate.engine),
    "plugin": Spec.of(Service(name="s"), version, resources).plugin,
    "addresses": [job(engine).address("words").key for engine in ({}, chosen, {**chosen, "step": 3})],
}))
"""


def test_a_plugin_s_engine_generates_and_its_revision_is_part_of_what_is_served(tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "model"
    facts = site / "count_engine-2.0.dist-info"
    facts.mkdir(parents=True)
    folder.mkdir()
    (site / "count_engine.py").write_text(PLUGIN)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: count-engine\nVersion: 2.0\n")
    (facts / "entry_points.txt").write_text("[vila_ops.engines]\ncount = count_engine\n")
    (folder / "first.txt").write_text("100")
    chosen = {"engine": {"kind": "count", "step": 2}}
    resources = json.dumps({"launch": "inline", "evaluate": chosen, "serve": chosen})

    done = subprocess.run(
        [sys.executable, "-c", USE, resources, str(folder)],
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{Path.cwd()}"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["outputs"] == [[[101, 103, 105], "length"], [[102, 104], "stop"]]
    assert printed["plugin"] == {"package": "count-engine", "version": "2.0", "revision": 4}
    assert printed["facts"] == {"kind": "count", "step": 2, "plugin": printed["plugin"]}
    assert len(set(printed["addresses"])) == 3, "of our engine, and of the plugin with each of its settings"


def test_an_engine_that_no_package_adds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'count'.*'torch'"):
        Resources.model_validate({"launch": "inline", "serve": {"engine": {"kind": "count"}}})
