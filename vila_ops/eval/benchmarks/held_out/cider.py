"""CIDEr-D of greedy captions, of the control's, and of the most frequent training caption."""

from vila_ops.config.eval import CaptionCider
from vila_ops.eval.metrics.cider import cider
from vila_ops.eval.runner import BenchmarkRunner, Metric, Role
from vila_ops.generate.engine import generate_all
from vila_ops.generate.request import Sampling

UNIT = "CIDEr-D (0 to 10)"


def caption_cider(bench: BenchmarkRunner, config: CaptionCider) -> tuple[list[Metric], list[dict[str, str]]]:
    """The metrics, and each image's caption beside the true one."""
    images = bench.items.images
    references = {image.key: [image.caption] for image in images}
    said: dict[Role, list[str]] = {
        "model": _captions(bench, [image.image for image in images], config),
        "chance": [bench.items.frequent_caption] * len(images),
    }
    if config.control == "shuffled":
        said["control"] = _captions(bench, [image.other_image for image in images], config)
    scored = {
        role: list(cider(dict(zip(references, texts, strict=True)), references).items.values())
        for role, texts in said.items()
    }
    metrics = [
        bench.metric("cider", role, scores, statistic="mean", unit=UNIT, clusters=bench.objects)
        for role, scores in scored.items()
    ]
    if config.control == "shuffled":
        metrics.append(bench.gap("cider", (scored["model"], scored["control"]), statistic="mean", unit=UNIT))
    answers = [
        {"key": p.key, "object": p.object, "truth": p.caption, "answer": said["model"][number]}
        | ({"control": said["control"][number]} if "control" in said else {})
        for number, p in enumerate(images)
    ]
    return metrics, answers


def _captions(bench: BenchmarkRunner, images: list[bytes], config: CaptionCider) -> list[str]:
    tokenizer = bench.generator.tokenizer
    sampling = Sampling(max_new_tokens=config.max_new_tokens, stop_ids=tokenizer.stop_ids)
    outputs = generate_all(bench.generator, [bench.caption_prompt(image) for image in images], sampling)
    return [tokenizer.decode(output.ids).strip() for output in outputs]
