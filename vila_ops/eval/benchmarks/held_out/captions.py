"""Caption loss and four-way choice of the caption; see `config.eval` for their rules."""

from vila_ops.config.eval import CaptionLoss, MultipleChoice
from vila_ops.eval.metrics.choice import share_right
from vila_ops.eval.runner import BenchmarkRunner, Metric, nll_and_tokens
from vila_ops.generate.request import Loglikelihood

NATS, SHARE = "nats per token", "share right"


def caption_loss(bench: BenchmarkRunner, config: CaptionLoss) -> list[Metric]:
    """Loss of the true caption given its own image; with a control, given another's, and the gap between the two."""
    name = "caption_loss"
    own = nll_and_tokens([scores[0] for scores in bench.own])
    metrics = [bench.metric(name, "model", own, statistic="ratio", unit=NATS, clusters=bench.objects)]
    if config.control == "shuffled":
        control = nll_and_tokens([scores[0] for scores in bench.control])
        metrics += [
            bench.metric(name, "control", control, statistic="ratio", unit=NATS, clusters=bench.objects),
            bench.gap(name, (control, own), statistic="ratio", unit=NATS),
        ]
    return metrics


def multiple_choice(bench: BenchmarkRunner, config: MultipleChoice) -> list[Metric]:
    """Share of images whose true caption gains most from the image; a quarter is chance."""
    name = "multiple_choice"
    own = _right(bench, bench.own)
    metrics = [
        bench.metric(name, "model", own, statistic="mean", unit=SHARE, clusters=bench.objects),
        Metric(name, "chance", 0.25, 0.25, 0.25, len(own), False, SHARE),
    ]
    if config.control == "shuffled":
        control = _right(bench, bench.control)
        metrics += [
            bench.metric(name, "control", control, statistic="mean", unit=SHARE, clusters=bench.objects),
            bench.gap(name, (own, control), statistic="mean", unit=SHARE),
        ]
    return metrics


def _right(bench: BenchmarkRunner, seen: list[list[Loglikelihood]]) -> list[float]:
    """1.0 where the true caption, which stands first, gains more log-likelihood from the image than the others."""
    right = []
    for image, given, without in zip(bench.items.images, seen, bench.blind, strict=True):
        gains = [blind.nll - score.nll for score, blind in zip(given, without, strict=True)]
        right.append(share_right(gains, item=image.key))
    return right
