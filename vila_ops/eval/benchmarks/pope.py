"""POPE-style questions: is the object there, is another one there."""

import numpy as np

from vila_ops.config.eval import Pope
from vila_ops.data.text.questions import YES_NO
from vila_ops.eval.bench import Bench, Metric, Role
from vila_ops.eval.items import Picture
from vila_ops.eval.metrics import pope as counts
from vila_ops.eval.metrics.pope import Answer


def pope(bench: Bench, config: Pope) -> list[Metric]:
    """Accuracy, F1 and yes-ratio of the model and of the control; always yes is chance.

    One question a picture: every second one asks for what is there, the others for what is not.
    """
    labels: list[tuple[str, Answer]] = [
        (picture.key, "yes" if _asks_for_what_is_there(number) else "no")
        for number, picture in enumerate(bench.items.pictures)
    ]
    sides: list[tuple[Role, np.ndarray]] = [
        ("model", counts.count(_answers(bench, control=False), labels)),
        ("chance", counts.count([(key, "Yes.") for key, _ in labels], labels)),
    ]
    if config.control == "deranged":
        sides.append(("control", counts.count(_answers(bench, control=True), labels)))
    of = {"pope_accuracy": counts.accuracy, "pope_f1": counts.f1, "pope_yes_ratio": counts.yes_ratio}
    return [
        bench.metric(name, role, values, statistic=statistic, unit="share", clusters=bench.objects)
        for name, statistic in of.items()
        for role, values in sides
    ]


def _answers(bench: Bench, *, control: bool) -> list[tuple[str, str]]:
    """Per question the likelier of the two answers."""
    tokenizer = bench.generator.tokenizer
    choices = [tokenizer.answer_ids("Yes."), tokenizer.answer_ids("No.")]
    pictures = bench.items.pictures
    prompts = [
        bench.chat_prompt(YES_NO.format(name=_name(number, p)), p.other_image if control else p.image)
        for number, p in enumerate(pictures)
    ]
    scores = bench.generator.score([(prompt, choices) for prompt in prompts])
    return [(p.key, "Yes." if yes.nll <= no.nll else "No.") for p, (yes, no) in zip(pictures, scores, strict=True)]


def _asks_for_what_is_there(number: int) -> bool:
    return number % 2 == 0


def _name(number: int, picture: Picture) -> str:
    return picture.object if _asks_for_what_is_there(number) else picture.absent
