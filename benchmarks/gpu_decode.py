"""Decoding and evaluation on a GPU.

Decoding: 16 prompts of 512 tokens and 128 new tokens each, by the scheduler of the in-process engine (`ours`, new
tokens per second) and by transformers' `generate` (`peer`), with the model of gpu_model.py in bf16. Target: 1.0.
Evaluation: the final suite of the tiny recipe on the GPU and on the CPU, in fp32; every number has to agree to 0.001.
Needs a GPU; VILA_BENCH_SMALL=1 runs it in small on the CPU.
"""

import tempfile
import time
from pathlib import Path

import torch
from gpu_model import SMALL, device, random_model
from result import result

from vila_ops.artifacts.kinds import Pretrained
from vila_ops.artifacts.store import content
from vila_ops.config import Run, load
from vila_ops.data.images import Fit
from vila_ops.data.preprocess.prepare import prepare
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.device import describe
from vila_ops.eval.evaluate import evaluate
from vila_ops.eval.report import read_report
from vila_ops.generate.request import Delta, Prompt, Sampling
from vila_ops.generate.torch_engine.image_features import RecentFeatures
from vila_ops.generate.torch_engine.loaded_model import LoadedModel
from vila_ops.generate.torch_engine.request_state import GenerationRequest
from vila_ops.generate.torch_engine.scheduler import Scheduler
from vila_ops.model.assemble import assemble
from vila_ops.model.pixels import Pixels
from vila_ops.model.trainable import compute_in
from vila_ops.packages.tokenizer import read_tokenizer

ROOT = Path(__file__).parents[1]
PROMPTS, LENGTH, NEW = (4, 32, 8) if SMALL else (16, 512, 128)
AGREE = 1e-3


def main() -> None:
    on = device()
    with tempfile.TemporaryDirectory() as folder:
        where = (f"resources.storage.store={folder}/store", f"resources.storage.cache={folder}/cache")
        recipe, resources = ROOT / "configs/recipes/tiny.yaml", ROOT / "configs/resources/inline.yaml"
        run = load(recipe, resources=resources, overrides=where)
        init = assemble(run.recipe.model, run.resources)
        ours, peer = tokens_per_s(init, on)
        apart, numbers, seconds = evaluations(run, init, folder)
    result(
        "gpu_decode",
        ours=ours,
        peer=peer,
        target=1.0,
        ok=ours >= peer and apart <= AGREE,
        unit="new tokens per second",
        evaluation={"numbers": numbers, "largest_difference": apart, "seconds": seconds},
        device=describe(on),
    )


def tokens_per_s(init: Pretrained, on: torch.device) -> tuple[float, float]:
    """New tokens per second of the scheduler and of transformers, the second time each."""
    model = random_model(on).eval()
    compute_in(torch.bfloat16, model, {})
    fast = read_tokenizer(content(init))
    tokenizer = Tokenizer(fast, image_tokens=576, after_image="")
    features = RecentFeatures(model, Pixels((0.5,) * 3, (0.5,) * 3), max_images=1)  # of prompts without images
    loaded = LoadedModel(model, on, tokenizer, features, Fit("pad", (0.5,) * 3))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(6, len(fast), (PROMPTS, LENGTH), generator=draw)
    ids[ids == tokenizer.image_id] = 7
    sampling = Sampling(max_new_tokens=NEW, stop_ids=frozenset())
    cache_tokens, prefill_tokens = PROMPTS * (LENGTH + NEW), PROMPTS * LENGTH
    scheduler = Scheduler(loaded, slots=PROMPTS, cache_tokens=cache_tokens, prefill_tokens=prefill_tokens)
    there = ids.to(on)
    own, other = [], []
    for _ in range(2):
        requests = [GenerationRequest(Prompt(row), sampling) for row in ids.tolist()]
        started = time.perf_counter()
        own.append(_num_generated(scheduler, requests) / (time.perf_counter() - started))
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(there, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        other.append((out.numel() - ids.numel()) / (time.perf_counter() - started))
    return own[1], other[1]


def _num_generated(scheduler: Scheduler, requests: list[GenerationRequest]) -> int:
    """Answer requests that come together. Returns the number of new tokens. Raises what ended a request."""
    events = scheduler.step(requests)
    while scheduler.is_busy:
        events += scheduler.step()
    for _, outcome in events:
        if isinstance(outcome, Exception):
            raise outcome
    return sum(len(outcome.ids) for _, outcome in events if isinstance(outcome, Delta))


def evaluations(run: Run, init: Pretrained, folder: str) -> tuple[float, int, dict[str, float]]:
    """The largest difference of a number of the suite, how many there are, and the seconds on both devices."""
    suite = run.recipe.final_suite.with_changes({"max_objects": 6, "max_words": 6, "bootstrap_resamples": 20})
    data = prepare(suite.mixture, run.recipe.text(max_tokens=suite.max_tokens), run.resources)
    numbers, seconds = [], {}
    for place in ("device", "cpu"):
        own = {"device": "cpu" if SMALL or place == "cpu" else "gpu", "storage.store": f"{folder}/{place}"}
        started = time.perf_counter()
        report = read_report(evaluate(suite, init, data, run.resources.with_changes(own)))
        seconds[place] = round(time.perf_counter() - started, 2)
        numbers.append([*(one.value for one in report.metrics), *(one.value for one in report.layers)])
    return max(abs(a - b) for a, b in zip(*numbers, strict=True)), len(numbers[0]), seconds


if __name__ == "__main__":
    main()
