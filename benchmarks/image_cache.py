"""Time to the first token of the second question on an image, beside that of the first.

The demo's model at 336 pixels, where an image has 576 tokens and dominates the prompt; and as it is, with 16. Both
questions have as many tokens. What is kept of the first one are the features of the image and the keys and values of
the tokens until the questions part. Target: 3 times shorter with 576 tokens.
"""

import statistics
import tempfile
from pathlib import Path

from result import result
from serving import SMALL, Server, chat, closed_loop, demo_version, our_server, photos

from vila_ops.artifacts.kinds import ModelVersion

COUNT = 2 if SMALL else 8
SIZES = {16: 56} if SMALL else {16: 56, 576: 336}
"""Tokens of an image -> its side in pixels."""
TARGET = 3.0


def main() -> None:
    """Measure and write the result."""
    medians: dict[int, list[float]] = {}
    for tokens, size in SIZES.items():
        with tempfile.TemporaryDirectory(prefix="vila") as folder:
            version = demo_version(Path(folder), image_size=size)
            pairs = measured(version, Path(folder))
        medians[tokens] = [round(statistics.median(values), 4) for values in zip(*pairs, strict=True)]
        print(tokens, pairs, flush=True)
    first, second = medians[max(SIZES)]
    result(
        "image_cache", ours=first, peer=second, target=TARGET, ok=first >= TARGET * second,
        unit="seconds of the first and of the second", image_tokens=max(SIZES), seconds_by_image_tokens=medians,
    )  # fmt: skip


def measured(version: ModelVersion, root: Path) -> list[list[float]]:
    """Seconds to the first token of both questions on each image, after one that warms up."""
    with our_server(version, root) as server:
        first_token(server, photos(1, seed=99)[0], "What is in front?")
        return [
            [first_token(server, image, question) for question in ("What is there?", "Where was this?")]
            for image in photos(COUNT)
        ]


def first_token(server: Server, image: str, question: str) -> float:
    """Seconds to the first token of an answer."""
    _, (seen,) = closed_loop(server, [chat(image, question, max_tokens=2)], clients=1)
    return seen.first


if __name__ == "__main__":
    main()
