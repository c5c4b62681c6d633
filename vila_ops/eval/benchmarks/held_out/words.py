"""Text only: which meaning belongs to a word, and the loss on plain text. From a source that no stage trains on."""

from vila_ops.eval.metrics.choice import share_right
from vila_ops.eval.runner import BenchmarkRunner, Metric, nll_and_tokens
from vila_ops.generate.engine import score_all
from vila_ops.generate.request import Prompt


def text_multiple_choice(bench: BenchmarkRunner) -> list[Metric]:
    """Share of words whose true meaning has the highest likelihood per token after "word: "; a quarter is chance."""
    tokenizer = bench.generator.tokenizer
    words = bench.items.words
    asked = [
        (
            Prompt([tokenizer.bos_id, *tokenizer.text_ids(f"{word.word}:")]),
            [tokenizer.text_ids(f" {meaning}") for meaning in (word.meaning, *word.distractors)],
        )
        for word in words
    ]
    scores = score_all(bench.generator, asked)
    right = [
        share_right([-score.nll / score.tokens for score in options], item=word.key)
        for word, options in zip(words, scores, strict=True)
    ]
    name, unit = "text_multiple_choice", "share right"
    keys = [word.key for word in words]
    return [
        bench.metric(name, "model", right, statistic="mean", unit=unit, clusters=keys),
        Metric(name, "chance", 0.25, 0.25, 0.25, len(words), False, unit),
    ]


def text_loss(bench: BenchmarkRunner) -> list[Metric]:
    """Loss on "word: meaning" as running text."""
    tokenizer = bench.generator.tokenizer
    words = bench.items.words
    texts = [tokenizer.text_ids(f"{word.word}: {word.meaning}") for word in words]
    scores = score_all(bench.generator, [(Prompt([tokenizer.bos_id]), [text]) for text in texts])
    values = nll_and_tokens([score for (score,) in scores])
    keys = [word.key for word in words]
    return [bench.metric("text_loss", "model", values, statistic="ratio", unit="nats per token", clusters=keys)]
