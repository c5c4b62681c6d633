"""Loss of held-out samples of any kind; see `config.eval.HeldOutLoss`."""

from collections.abc import Mapping, Sequence

from vila_ops.config.eval import HeldOutLoss
from vila_ops.eval.benchmark import LazyTokenizer, MetricValues, ScoreRequest
from vila_ops.eval.benchmarks.held_out.items import HeldOut, SampleItem, sample_items
from vila_ops.eval.benchmarks.held_out.prompts import check_tokenizer, loss_values, prompt_of, shown_by_condition
from vila_ops.eval.rows import ItemRow

REVISION = 5
NAME = "held_out_loss"


def read(source: HeldOut, config: HeldOutLoss) -> tuple[SampleItem, ...]:
    """The held-out samples. Raises ValueError where they are of another tokenizer."""
    samples = sample_items(source.inputs, None, with_images=config.control == "shuffled")
    check_tokenizer(samples, source.tokenizer())
    return samples


def requests(items: Sequence[SampleItem], config: HeldOutLoss, tokenizer: LazyTokenizer) -> list[ScoreRequest]:
    """The likelihood of each run of target tokens after everything before it; `rotation` numbers the runs."""
    return [
        ScoreRequest(
            item=item.id,
            condition=condition,
            rotation=number,
            prompt=prompt_of(item, start, images, tokenizer()),
            continuations=(item.input_ids[start:stop],),
        )
        for condition, shown in shown_by_condition(items, config.control).items()
        for item, images in zip(items, shown, strict=True)
        for number, (start, stop) in enumerate(item.spans)
    ]


def score(items: Sequence[SampleItem], rows: Sequence[ItemRow], config: HeldOutLoss) -> list[Mapping[str, float]]:
    """Nats and tokens of each run."""
    return [{"nats": row.response.nats[0], "tokens": row.response.tokens[0]} for row in rows]


def metrics(items: Sequence[SampleItem], rows: Sequence[ItemRow], config: HeldOutLoss) -> list[MetricValues]:
    """All nats by all tokens, of the matched and of the shuffled images."""
    return loss_values(NAME, rows)
