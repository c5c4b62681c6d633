"""Weight-only quantisation on a CPU: bytes, speed and loss of the demo's model in fp32, int8 and int4.

One client asks about one image at a time, on one thread; the precisions take turns. `ours` and `peer` are new tokens a
second in int8 and in fp32, medians of ROUNDS. Targets: int8 has at most 0.45 of 4 bytes a parameter in memory, tower
included, and is no slower. fp32 itself has more in memory, since a packed head is not tied to the embedding. The loss
is that of the definitions of WordNet in `tests/tiny`, which do not change, in nats a token. It tells the cost in
quality roughly; `vila-ops compare` of two evaluations tells it for a trained model.
"""

import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from PIL import Image as Pillow
from result import result

from vila_ops.artifacts.store import content
from vila_ops.config import load
from vila_ops.config.engine import TorchEngine
from vila_ops.data.records import Image
from vila_ops.generate.engine import EngineOptions, generate_all, score_all
from vila_ops.generate.request import Prompt, Sampling
from vila_ops.generate.torch_engine.engine import InProcessEngine, open_engine
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble

ROOT = Path(__file__).parents[1]
DEFINITIONS = ROOT / "tests/tiny/definitions/records.jsonl"
SMALL = bool(os.environ.get("VILA_BENCH_SMALL"))
RECIPE = "tiny" if SMALL else "demo"
NEW, ROUNDS = (4, 2) if SMALL else (64, 5)
PRECISIONS = ("fp32", "int8", "int4")
MOST_BYTES, LEAST_SPEED = 0.45, 1.0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe, resources = ROOT / f"configs/recipes/{RECIPE}.yaml", ROOT / "configs/resources/inline.yaml"
        run = load(recipe, resources=resources, overrides=(f"resources.storage.store={folder}/store",))
        model = content(assemble(run.recipe.model, run.resources))
        engines = {
            precision: open_engine(TorchEngine(), model, EngineOptions(precision=precision, device="cpu", threads=1))
            for precision in PRECISIONS
        }
        seconds: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        for number in range(ROUNDS + 1):
            for precision, engine in engines.items():
                spent = seconds_of(engine, number)
                if number:  # the first round warms up
                    seconds[precision].append(spent)
        speed = {one: NEW / statistics.median(spent) for one, spent in seconds.items()}
        sizes = {one: memory_bytes(engine) for one, engine in engines.items()}
        fp32_bytes = 4 * sum(parameter.numel() for parameter in model_folder.load(model).parameters())
        losses = {one: round(loss(engine), 4) for one, engine in engines.items()}
    share = sizes["int8"] / fp32_bytes
    result(
        "quantised",
        ours=speed["int8"],
        peer=speed["fp32"],
        target=LEAST_SPEED,
        ok=speed["int8"] >= LEAST_SPEED * speed["fp32"] and share <= MOST_BYTES,
        unit="new tokens per second, one client",
        tokens_per_second={one: round(value, 2) for one, value in speed.items()},
        memory_bytes=sizes,
        fp32_bytes=fp32_bytes,
        share_of_bytes={one: round(size / fp32_bytes, 3) for one, size in sizes.items()},
        most_share_of_bytes=MOST_BYTES,
        nats_per_token=losses,
        rounds=ROUNDS,
    )


def seconds_of(engine: InProcessEngine, number: int) -> float:
    """The seconds of an answer of NEW tokens about an image that is new."""
    side = engine.image_size
    out = io.BytesIO()
    Pillow.linear_gradient("L").rotate(7 * number).resize((side, side)).convert("RGB").save(out, "PNG")
    square = out.getvalue()
    prompt = Prompt(engine.tokenizer.prompt([("user", (Image(square), "What is in this image?"))]), (square,))
    started = time.perf_counter()
    generate_all(engine, [prompt], Sampling(max_new_tokens=NEW, stop_ids=frozenset()))
    return time.perf_counter() - started


def memory_bytes(engine: InProcessEngine) -> int:
    """Bytes of all weights of a model in memory; tied ones count once, and their packed copy too."""
    model = engine.loaded.model
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def loss(engine: InProcessEngine) -> float:
    """Nats a token of the definitions, one a line, in texts of 256 tokens and the rest, each after one token more."""
    records = [json.loads(line) for line in DEFINITIONS.read_text().splitlines()]
    ids = engine.tokenizer.text_ids("\n".join(record["turns"][0]["parts"][0]["text"] for record in records))
    texts = [ids[start : start + 257] for start in range(0, len(ids) - 1, 257)]
    scored = score_all(engine, [(Prompt(one[:1]), [one[1:]]) for one in texts])
    return sum(one.nll for each in scored for one in each) / sum(len(one) - 1 for one in texts)


if __name__ == "__main__":
    main()
