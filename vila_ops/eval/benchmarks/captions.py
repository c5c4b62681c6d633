"""Caption loss and four-way choice of the caption; see `config.eval` for their rules."""

from vila_ops.eval.bench import Bench, Metric, nll_and_tokens
from vila_ops.eval.metrics.choice import pick
from vila_ops.generate.engine import Score

UNIT = "nats per token"


def caption_loss(bench: Bench) -> list[Metric]:
    """Loss of the true caption given its own picture, given another's, and the gap between the two."""
    own = nll_and_tokens([scores[0] for scores in bench.captions.own])
    control = nll_and_tokens([scores[0] for scores in bench.captions.control])
    return [
        bench.metric("caption_loss", "model", own, statistic="ratio", unit=UNIT, clusters=bench.objects),
        bench.metric("caption_loss", "control", control, statistic="ratio", unit=UNIT, clusters=bench.objects),
        bench.gap("caption_loss", (control, own), statistic="ratio", unit=UNIT),
    ]


def multiple_choice(bench: Bench) -> list[Metric]:
    """Share of pictures whose true caption gains most from the picture; a quarter is chance."""
    own, control = (
        [_right(seen, blind, key=picture.key) for seen, blind, picture in zip(scores, blinds, pictures, strict=True)]
        for scores, blinds, pictures in (
            (bench.captions.own, bench.captions.blind, bench.items.pictures),
            (bench.captions.control, bench.captions.blind, bench.items.pictures),
        )
    )
    name, unit = "multiple_choice", "share right"
    n = len(own)
    return [
        bench.metric(name, "model", own, statistic="mean", unit=unit, clusters=bench.objects),
        bench.metric(name, "control", control, statistic="mean", unit=unit, clusters=bench.objects),
        Metric(name, "chance", 0.25, 0.25, 0.25, n, False, unit),
        bench.gap(name, (own, control), statistic="mean", unit=unit),
    ]


def _right(seen: list[Score], blind: list[Score], *, key: str) -> float:
    """1.0 when the true caption, which stands first, gains more log-likelihood from the picture than the others."""
    gains = [without.nll - given.nll for given, without in zip(seen, blind, strict=True)]
    return float(pick(gains, item=key) == 0)
