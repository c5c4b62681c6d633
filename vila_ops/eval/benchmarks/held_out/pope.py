"""POPE-style questions: is the object there, is another one there."""

import numpy as np

from vila_ops.config.eval import PopeBenchmark
from vila_ops.data.text.questions import YES_NO
from vila_ops.eval.benchmarks.held_out.items import ImageItem
from vila_ops.eval.metrics import pope as counts
from vila_ops.eval.metrics.pope import Answer
from vila_ops.eval.runner import BenchmarkRunner, Metric, Role
from vila_ops.generate.engine import score_all


def pope(bench: BenchmarkRunner, config: PopeBenchmark) -> list[Metric]:
    """Accuracy, F1 and yes-ratio of the model and of the control; always yes is chance.

    One question an image: every second one asks for what is there, the others for what is not.
    """
    labels: list[tuple[str, Answer]] = [
        (image.key, "yes" if _asks_for_what_is_there(number) else "no")
        for number, image in enumerate(bench.items.images)
    ]
    sides: list[tuple[Role, np.ndarray]] = [
        ("model", counts.count(_answers(bench, control=False), labels)),
        ("chance", counts.count([(key, "Yes.") for key, _ in labels], labels)),
    ]
    if config.control == "shuffled":
        sides.append(("control", counts.count(_answers(bench, control=True), labels)))
    of = {"pope_accuracy": counts.accuracy, "pope_f1": counts.f1, "pope_yes_ratio": counts.yes_ratio}
    return [
        bench.metric(name, role, values, statistic=statistic, unit="share", clusters=bench.objects)
        for name, statistic in of.items()
        for role, values in sides
    ]


def _answers(bench: BenchmarkRunner, *, control: bool) -> list[tuple[str, str]]:
    """Per question the likelier of the two answers."""
    tokenizer = bench.generator.tokenizer
    choices = [tokenizer.answer_ids("Yes."), tokenizer.answer_ids("No.")]
    images = bench.items.images
    prompts = [
        bench.chat_prompt(YES_NO.format(name=_name(number, p)), p.other_image if control else p.image)
        for number, p in enumerate(images)
    ]
    scores = score_all(bench.generator, [(prompt, choices) for prompt in prompts])
    return [(p.key, "Yes." if yes.nll <= no.nll else "No.") for p, (yes, no) in zip(images, scores, strict=True)]


def _asks_for_what_is_there(number: int) -> bool:
    return number % 2 == 0


def _name(number: int, image: ImageItem) -> str:
    return image.object if _asks_for_what_is_there(number) else image.absent
