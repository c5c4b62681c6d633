"""CIDEr-D of greedy captions, of the control's, and of the most frequent training caption."""

from vila_ops.config.eval import CaptionCider
from vila_ops.eval.bench import Bench, Metric
from vila_ops.eval.metrics.cider import cider


def caption_cider(bench: Bench, config: CaptionCider) -> tuple[list[Metric], list[dict[str, str]]]:
    """The metrics, and each picture's caption beside the true one."""
    pictures = bench.items.pictures
    references = {picture.key: [picture.caption] for picture in pictures}
    own = _captions(bench, [picture.image for picture in pictures], config)
    control = _captions(bench, [picture.other_image for picture in pictures], config)
    frequent = [bench.items.frequent_caption] * len(pictures)
    scored = {
        role: list(cider(dict(zip(references, said, strict=True)), references).items.values())
        for role, said in (("model", own), ("control", control), ("chance", frequent))
    }
    unit = "CIDEr-D (0 to 10)"
    metrics = [
        bench.metric("cider", "model", scored["model"], statistic="mean", unit=unit, clusters=bench.objects),
        bench.metric("cider", "control", scored["control"], statistic="mean", unit=unit, clusters=bench.objects),
        bench.metric("cider", "chance", scored["chance"], statistic="mean", unit=unit, clusters=bench.objects),
        bench.gap("cider", (scored["model"], scored["control"]), statistic="mean", unit=unit),
    ]
    said = [
        {"key": picture.key, "object": picture.object, "truth": picture.caption, "answer": answer, "control": swapped}
        for picture, answer, swapped in zip(pictures, own, control, strict=True)
    ]
    return metrics, said


def _captions(bench: Bench, images: list[bytes], config: CaptionCider) -> list[str]:
    answers = bench.generator.generate(
        [bench.caption_prompt(image) for image in images], max_new_tokens=config.max_new_tokens
    )
    return [bench.generator.tokenizer.decode(answer.ids).strip() for answer in answers]
