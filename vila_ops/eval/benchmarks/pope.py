"""POPE-style questions: is the object there, is another one there."""

import numpy as np

from vila_ops.data.questions import YES_NO
from vila_ops.eval.bench import Bench, Metric, Role
from vila_ops.eval.metrics import pope as counts
from vila_ops.eval.metrics.pope import Answer


def pope(bench: Bench) -> list[Metric]:
    """Accuracy, F1 and yes-ratio of the model and of the control; always yes is chance."""
    labels: list[tuple[str, Answer]] = []
    for picture in bench.items.pictures:
        labels += [(f"{picture.key}/there", "yes"), (f"{picture.key}/absent", "no")]
    objects = [object_ for object_ in bench.objects for _ in range(2)]
    own = counts.count(_answers(bench, control=False), labels)
    control = counts.count(_answers(bench, control=True), labels)
    always = counts.count([(id_, "Yes.") for id_, _ in labels], labels)
    metrics: list[Metric] = []
    of = {"pope_accuracy": counts.accuracy, "pope_f1": counts.f1, "pope_yes_ratio": counts.yes_ratio}
    for name, statistic in of.items():
        roles: tuple[tuple[Role, np.ndarray], ...] = (("model", own), ("control", control), ("chance", always))
        metrics += [
            bench.metric(name, role, values, statistic=statistic, unit="share", clusters=objects)
            for role, values in roles
        ]
    return metrics


def _answers(bench: Bench, *, control: bool) -> list[tuple[str, str]]:
    """Per question the likelier of the two answers."""
    tokenizer = bench.generator.tokenizer
    choices = [tokenizer.text_ids("Yes."), tokenizer.text_ids("No.")]
    asked, ids = [], []
    for picture in bench.items.pictures:
        image = picture.other_image if control else picture.image
        for kind, name in (("there", picture.object), ("absent", picture.absent)):
            asked.append((bench.chat_prompt(YES_NO.format(name=name), image), choices))
            ids.append(f"{picture.key}/{kind}")
    scores = bench.generator.score(asked)
    return [(id_, "Yes." if yes.nll <= no.nll else "No.") for id_, (yes, no) in zip(ids, scores, strict=True)]
