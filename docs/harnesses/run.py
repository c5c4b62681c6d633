"""Writes what two other evaluation harnesses measure beside ours into docs/interop.md: the end of `make interop`.

lmms-eval (one task: POPE) and VLMEvalKit (a TSV: MMBench, circular; its rows once more as single questions) run in
environments of their own in build/harnesses, which are made once, of the packages listed beside this file, and take
torch from ours. They ask our endpoint, with the demo's model without training, the questions of samples of this
repository, and score the answers by their rules. `vila-ops` asks the same endpoint the same prompts. Answers have to be
equal item by item, and so have scores under the rule of the harness.

The model answers "Yes." and "No." to POPE if it is asked for them, and lmms-eval counts these words alone, so an answer
has one token there. It names the second option of every question, so none is right in all of its rotations, and a third
of the rows are.

VLMEvalKit sends every image as JPEG again, so its TSV has images of which a second encoding changes no pixel.
"""

import base64
import csv
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as Pillow

from vila_ops.artifacts.kinds import Checkpoint, Endpoint, ModelVersion
from vila_ops.config import OfficialSuite, Resources, Service, load
from vila_ops.eval import report
from vila_ops.eval.evaluate import evaluate, job_of
from vila_ops.model.assemble import assemble
from vila_ops.serve.spec import Spec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/interop.md"
SAMPLES = ROOT / "docs/samples"
ENVIRONMENTS = ROOT / "build/harnesses"
START, END = "<!-- made by docs/harnesses/run.py -->", "<!-- end of harnesses -->"
MODEL, TASK = "vila", "vila_pope"
CIRCULAR, SINGLE = "vila_mmbench", "vila_rows"
"""Tables of VLMEvalKit, which takes one with "mmbench" in its name for circular."""
HINT = "Answer yes or no."
OPTIONS_HINT = "Please select the correct answer from the options above. "
TOKENS = 8
"""Most tokens of an answer to a question with options."""
SIDE = 112
"""VLMEvalKit enlarges images below 100 pixels."""
VLMEVALKIT_RUN = """
import runpy, torch
operators = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
runpy.run_module("vlmeval.run", run_name="__main__", alter_sys=True)
"""
"""VLMEvalKit imports torchvision, whose wheel has no operators for the CPU build of torch: two have to be declared."""
Answers = Mapping[str, str]
"""The stripped answer to each item."""


def main() -> None:
    """Write the table between its marks. Raises AssertionError where answers or scores differ."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run = load(ROOT / "configs/recipes/demo.yaml", resources=ROOT / "configs/resources/inline.yaml")
        resources = run.resources.with_changes({"storage.store": str(root / "store"), "serve.max_batch": 8})
        with served(run.recipe.model, resources, root) as url:
            rows = [lmms_eval(url, resources, root), *vlmevalkit(url, resources, root)]
    head = "| harness | data | answers equal | its score | its rule on our answers | ours, official | ours, corrected |"
    lines = [head, f"|{' --- |' * 7}", *rows]
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text("\n".join([before + START, *lines, END]) + rest.partition(END)[2])


def lmms_eval(url: str, resources: Resources, root: Path) -> str:
    """The row of lmms-eval. It asks the questions of POPE's random set."""
    questions = [json.loads(line) for line in (SAMPLES / "pope/coco_pope_random.json").read_text().splitlines()]
    folder = root / "lmms-eval"
    folder.mkdir()
    _pope_table(questions, folder / "pope.parquet")
    functions = ("pope_doc_to_visual", "pope_doc_to_text", "pope_process_results", "pope_aggregate_accuracy")
    (folder / "rules.py").write_text(f"from lmms_eval.tasks.pope.utils import {', '.join(functions)}\n")
    (folder / f"{TASK}.yaml").write_text(_POPE_TASK.format(data=folder / "pope.parquet", hint=HINT))
    python = environment("lmms-eval")
    arguments = f"model_version={MODEL},base_url={url},api_key=none,num_concurrent=4,timeout=600"
    command = [python, "-m", "lmms_eval", "--model", "openai", "--model_args", arguments, "--tasks", TASK]
    command += ["--include_path", folder, "--log_samples", "--output_path", folder / "out", "--batch_size", "1"]
    ran(command, folder, HF_HOME=folder / "hub", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    results, samples = written(folder, "*results.json"), written(folder, f"*samples_{TASK}.jsonl")
    score = json.loads(results.read_text())["results"][TASK]["pope_accuracy,none"]
    theirs = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        question = questions[sample["doc_id"]]
        theirs[f"{question['image']}:{question['text']}"] = _text(sample["filtered_resps"]).strip()
    benchmark = {
        "kind": "pope",
        "version": None,
        "prompt": {
            "user": "{image}{question}\n{hint}",
            "hint": HINT,
            "answer": {"kind": "generate", "max_new_tokens": 1},
        },
    }
    answers, metrics = ours(benchmark, url, resources.with_changes({"storage.benchmarks": str(SAMPLES)}))
    labels = {f"{one['image']}:{one['text']}": one["label"] for one in questions}
    by_their_rule = sum(answers[item].lower() == label for item, label in labels.items()) / len(labels)
    numbers = [metrics["pope_random_accuracy_official"], metrics["pope_random_accuracy_corrected"]]
    return row("lmms-eval 0.7.3", "POPE, random", theirs, answers, [score, by_their_rule, *numbers])


def _pope_table(questions: list[dict[str, Any]], path: Path) -> None:
    """The questions with their images, as `datasets` stores an Image."""
    rows = [
        {
            "question_id": str(one["question_id"]),
            "question": one["text"],
            "answer": one["label"],
            "image": {"bytes": (SAMPLES / "pope/val2014" / one["image"]).read_bytes(), "path": one["image"]},
        }
        for one in questions
    ]
    features = {name: {"dtype": "string", "_type": "Value"} for name in ("question_id", "question", "answer")}
    noted = {"info": {"features": features | {"image": {"_type": "Image"}}}}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema([*((name, pa.string()) for name in features), ("image", image)])
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({"huggingface": json.dumps(noted)}))
    pq.write_table(table, path)


_POPE_TASK = """\
task: vila_pope
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function rules.pope_doc_to_visual
doc_to_text: !function rules.pope_doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 1, temperature: 0, do_sample: false}}
process_results: !function rules.pope_process_results
metric_list:
  - {{metric: pope_accuracy, aggregation: !function rules.pope_aggregate_accuracy, higher_is_better: true}}
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: "\\n{hint}"}}}}
"""
"""POPE of lmms-eval on local data: its own functions, and its own form of a prompt."""


def vlmevalkit(url: str, resources: Resources, root: Path) -> list[str]:
    """The rows of VLMEvalKit: every rotation of the questions of MMBench, circular and each for itself."""
    folder = root / "vlmevalkit"
    benchmarks = folder / "benchmarks"
    files = {CIRCULAR: benchmarks / "mmbench/mmbench_dev_20230712.tsv", SINGLE: benchmarks / "ai2d/AI2D_TEST.tsv"}
    _tables(files)
    for name, file in files.items():
        (folder / f"{name}.tsv").write_bytes(file.read_bytes())
    model = {"class": "GPT4V", "model": MODEL, "api_base": f"{url}/chat/completions", "key": "none"}
    model |= {"temperature": 0, "img_size": -1, "max_tokens": TOKENS, "retry": 2, "timeout": 600}
    data = {name: {"class": "CustomMCQDataset", "dataset": name} for name in files}
    (folder / "config.json").write_text(json.dumps({"model": {MODEL: model}, "data": data}))
    python = environment("vlmevalkit")
    command = [python, "-c", VLMEVALKIT_RUN, "--config", folder / "config.json", "--work-dir", folder / "out"]
    command += ["--judge", "exact_matching", "--api-nproc", "4"]
    ran(command, folder, LMUData=folder, PRED_FORMAT="tsv")
    own = resources.with_changes({"storage.benchmarks": str(benchmarks)})
    asked = "Question: {question}\nOptions:\n{options}\n{hint}\n"
    prompt = {
        "user": f"{{image}}{asked}",
        "hint": OPTIONS_HINT,
        "answer": {"kind": "generate", "max_new_tokens": TOKENS},
    }
    with_hint = {**prompt, "user": f"{{image}}Hint: {{context}}\n{asked}"}
    circular = {"kind": "mmbench", "version": "dev_20230712", "prompt": with_hint}
    single = {"kind": "ai2d", "prompt": prompt}
    return [
        _of_table(folder, CIRCULAR, "MMBench, circular", ours(circular, url, own), "mmbench_dev_20230712"),
        _of_table(folder, SINGLE, "its rows as single questions", ours(single, url, own), "ai2d_masked"),
    ]


def _of_table(folder: Path, name: str, data: str, measured: tuple[Answers, Mapping[str, float]], metric: str) -> str:
    """The row of a table of VLMEvalKit. Its rule is our official column."""
    theirs = {line["index"]: line["prediction"].strip() for line in _lines(written(folder, f"{MODEL}_{name}.tsv"))}
    (scores,) = _lines(written(folder, f"{MODEL}_{name}*_acc.csv"), ",")
    answers, metrics = measured
    official, corrected = metrics[f"{metric}_official"], metrics[f"{metric}_corrected"]
    numbers = [float(scores["Overall"]), official, official, corrected]
    return row("VLMEvalKit (ms-vlmeval 0.0.20)", data, theirs, answers, numbers)


def _tables(files: Mapping[str, Path]) -> None:
    """The sample of MMBench with a hint in every row, and its rows without hints and under other numbers.

    A second encoding of an image as JPEG changes no pixel.
    """
    rows = _lines(SAMPLES / "mmbench/mmbench_dev_20230712.tsv")
    for one in rows:
        image = Pillow.open(io.BytesIO(base64.b64decode(one["image"]))).resize((SIDE, SIDE))
        one |= {"image": base64.b64encode(_stable(image)).decode(), "hint": one["hint"] or "Look at the image."}
    single = [
        {"index": str(number), **{key: value for key, value in one.items() if key not in ("index", "hint")}}
        for number, one in enumerate(rows)
    ]
    for file, table in ((files[CIRCULAR], rows), (files[SINGLE], single)):
        file.parent.mkdir(parents=True)
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, list(table[0]), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def _stable(image: Pillow.Image) -> bytes:
    """The image as JPEG, encoded until its pixels no longer change."""
    pixels = None
    while image.tobytes() != pixels:
        pixels, file = image.tobytes(), io.BytesIO()
        image.save(file, "JPEG")
        image = Pillow.open(io.BytesIO(file.getvalue()))
    return file.getvalue()


def _lines(path: Path, separator: str = "\t") -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=separator))


def _text(given: Any) -> str:
    """The answer of a sample, which lmms-eval may put into lists."""
    return _text(given[0]) if isinstance(given, list) else str(given)


def ours(benchmark: dict[str, Any], url: str, resources: Resources) -> tuple[Answers, Mapping[str, float]]:
    """What `vila-ops evaluate --endpoint` answers and measures, by item and by metric."""
    suite = OfficialSuite.model_validate({"name": "harness", "benchmarks": {"own": benchmark}})
    endpoint = Endpoint(url=url, name=MODEL)
    made = report.read_report(evaluate(suite, endpoint, None, resources))
    result = job_of(suite, endpoint, None, resources).result("own")
    assert result is not None
    answers = {one.item: one.answer for one in report.read_items(result)}
    assert None not in answers.values(), answers
    return {item: str(answer) for item, answer in answers.items()}, {one.measure: one.value for one in made.metrics}


def row(name: str, data: str, theirs: Answers, answers: Answers, numbers: list[float]) -> str:
    """A row of the table. `numbers`: their score, their rule on our answers, our columns."""
    equal = sum(answers[item] == answer for item, answer in theirs.items())
    assert equal == len(theirs), {item: (answer, answers[item]) for item, answer in theirs.items()}
    assert abs(numbers[0] - numbers[1]) < 1e-6, numbers
    return f"| {name} | {data}, {len(theirs)} questions | {equal} | {' | '.join(f'{one:.4f}' for one in numbers)} |"


@contextmanager
def served(model: Any, resources: Resources, root: Path) -> Iterator[str]:
    """The base URL of our endpoint with the model without training."""
    made = assemble(model, resources)
    checkpoint = Checkpoint(uri=made.uri, digest=made.digest, stage="base", step=0)
    version = ModelVersion(name=MODEL, version=1, checkpoint=checkpoint, promoted=False)
    spec = Spec.of(Service(name=MODEL), version, resources)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = str(listener.getsockname()[1])
    command = [sys.executable, "-m", "vila_ops.serve.backends.local_server", spec.model_dump_json(), "127.0.0.1", port]
    with (root / "server.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            while not _is_ready(f"http://127.0.0.1:{port}/ready"):
                assert server.poll() is None, (root / "server.log").read_text()
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


def environment(name: str) -> Path:
    """The Python of an environment with a harness; what it lacks comes from ours."""
    folder = ENVIRONMENTS / name
    python = folder / "bin/python"
    if not (folder / "made").exists():
        uv, packages = Path(sys.executable).with_name("uv"), Path(__file__).with_name(f"{name}.txt")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", python, "-r", packages], check=True)
        (ours,) = (path for path in sys.path if path.endswith("site-packages"))
        next(folder.glob("lib/python*/site-packages")).joinpath("ours.pth").write_text(ours)
        (folder / "made").touch()
    return python


def written(folder: Path, pattern: str) -> Path:
    """A file that a harness wrote. Raises RuntimeError with its log: lmms-eval exits with 0 after an error."""
    files = sorted((folder / "out").rglob(pattern))
    if not files:
        raise RuntimeError(f"{folder.name} wrote no {pattern}: {(folder / 'log.txt').read_text()[-3000:]}")
    return files[0]


def ran(command: list[Any], folder: Path, **environ: Any) -> None:
    """Run a harness in its folder. Raises RuntimeError with the end of its log."""
    log = folder / "log.txt"
    own = {"OPENAI_API_KEY": "none", "PYTHONPATH": "", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **own, **{name: str(value) for name, value in environ.items()}}
    with log.open("wb") as file:
        done = subprocess.run([str(one) for one in command], cwd=folder, env=env, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder.name} ended with {done.returncode}: {log.read_text()[-3000:]}")


if __name__ == "__main__":
    main()
