"""The shape of every benchmark: items, requests, scores of each row, values of metrics, official files.

A benchmark is a module with a `REVISION` and the functions of `BenchmarkModule`. Data flows one way:

    read      official files, or held-out data                         -> items
    requests  items and the prompt of the config                       -> requests, to generate or to score
              (the runner asks a target; each response becomes a row of items.parquet)
    score     items and rows                                           -> the scores of each row
    metrics   items and scored rows                                    -> the values of each metric
              (`scoring` makes intervals, slices and gaps of these)
    official_files (where a server or script reads one)                -> the bytes of each official file

All but `read` are pure, so a result is scored again without a model. Third-party packages add benchmarks by entry
points of the group `vila_ops.benchmarks`; see `config.kinds`.
"""

# N units, K columns of a metric

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from vila_ops.config.kinds import module_of, provenance
from vila_ops.data.records import Image
from vila_ops.eval.report import MetricRole
from vila_ops.eval.rows import ItemRow
from vila_ops.eval.statistics import FloatArray, Statistic
from vila_ops.generate.request import Prompt

if TYPE_CHECKING:
    from vila_ops.data.text.conversation import Tokenizer

BENCHMARKS_FOLDER, HELD_OUT = "vila_ops.eval.benchmarks", "vila_ops.eval.benchmarks.held_out"
BENCHMARKS = {
    "alignment": f"{HELD_OUT}.alignment",
    "answer_match": f"{HELD_OUT}.answer_match",
    "caption_loss": f"{HELD_OUT}.caption_loss",
    "cider": f"{HELD_OUT}.cider",
    "held_out_loss": f"{HELD_OUT}.held_out_loss",
    "held_out_pope": f"{HELD_OUT}.held_out_pope",
    "multiple_choice": f"{HELD_OUT}.multiple_choice",
    "new_names": f"{HELD_OUT}.new_names",
    "text_loss": f"{HELD_OUT}.text_loss",
    "text_multiple_choice": f"{HELD_OUT}.text_multiple_choice",
    "ai2d": f"{BENCHMARKS_FOLDER}.ai2d",
    "bbh": f"{BENCHMARKS_FOLDER}.bbh",
    "chartqa": f"{BENCHMARKS_FOLDER}.chartqa",
    "coco_captions": f"{BENCHMARKS_FOLDER}.captions",
    "docvqa": f"{BENCHMARKS_FOLDER}.docvqa",
    "drop": f"{BENCHMARKS_FOLDER}.drop",
    "flickr30k_captions": f"{BENCHMARKS_FOLDER}.captions",
    "llava_bench": f"{BENCHMARKS_FOLDER}.llava_bench",
    "mm_vet": f"{BENCHMARKS_FOLDER}.mm_vet",
    "mmlu": f"{BENCHMARKS_FOLDER}.mmlu",
    "mmmu": f"{BENCHMARKS_FOLDER}.mmmu",
    "seed_bench": f"{BENCHMARKS_FOLDER}.seed_bench",
    "gqa": f"{BENCHMARKS_FOLDER}.gqa",
    "mmbench": f"{BENCHMARKS_FOLDER}.mmbench",
    "mmbench_cn": f"{BENCHMARKS_FOLDER}.mmbench",
    "mme": f"{BENCHMARKS_FOLDER}.mme",
    "okvqa": f"{BENCHMARKS_FOLDER}.okvqa",
    "pope": f"{BENCHMARKS_FOLDER}.pope",
    "scienceqa": f"{BENCHMARKS_FOLDER}.scienceqa",
    "textvqa": f"{BENCHMARKS_FOLDER}.textvqa",
    "vizwiz": f"{BENCHMARKS_FOLDER}.vizwiz",
    "vqav2": f"{BENCHMARKS_FOLDER}.vqav2",
}
"""Our kinds and their modules, which are imported when a suite has such a benchmark."""

LazyTokenizer = Callable[[], "Tokenizer"]
"""The tokenizer of the model, loaded when it is called. Raises ValueError where the target is an endpoint, of which
nobody knows the tokenizer."""


@dataclass(frozen=True)
class SealedImage:
    """An image of a sealed benchmark."""

    key: str
    """sha256 of its file."""


@dataclass(frozen=True)
class Unreadable:
    """An image that is not there or cannot be read, with the reason; `read` puts it in the image's place."""

    reason: str


Part = str | Image | SealedImage | Unreadable
Parts = tuple[Part, ...]


@dataclass(frozen=True)
class Item:
    """One question of a benchmark. Benchmarks on held-out data have classes of their own with more fields."""

    id: str
    """Unique in the benchmark, as the official files name it."""
    group: str
    """Items of one group, such as the questions of one image, are not independent."""
    parts: Mapping[str, Parts] = field(default_factory=dict)
    """What the prompt may name: `image`, `question`, `context`, ...; text and images in their order."""
    options: tuple[str, ...] = ()
    """Answers to choose from, in order."""
    references: Any = None
    """What the scorer compares an answer with, as JSON values."""
    answer: str = ""
    """What the item answers where it is a demonstration."""
    slices: tuple[str, ...] = ()
    """Subsets that hold it, such as `category: scenes`."""

    def readable_images(self) -> "tuple[Image | SealedImage, ...]":
        """Its images that can be read, in their order."""
        return tuple(part for parts in self.parts.values() for part in parts if isinstance(part, (Image, SealedImage)))

    def problem(self) -> str | None:
        """Why the item cannot be asked; None if it can."""
        reasons = (part.reason for parts in self.parts.values() for part in parts if isinstance(part, Unreadable))
        return next(reasons, None)


@dataclass(frozen=True)
class TextPrompt:
    """A prompt as text and images, which the target writes for its model: token ids, or messages of a chat API."""

    turns: tuple[tuple[str, Parts], ...]
    """(role, parts); one `user` turn for a running text."""
    is_chat: bool = True
    """Written with the chat template; else bos and the running text."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked about an item. Its response is one row of the items table, under the first three fields."""

    item: str
    condition: str = "matched"
    """`matched`, or for controls `shuffled` and `no_image`."""
    rotation: int = 0
    """By how many places the options are rotated; or which of several requests of an item it is."""
    shots: tuple[str, ...] = ()
    """Ids of the demonstrations, in their order; they say which control it is."""
    prompt: TextPrompt | Prompt


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(Request):
    """A greedy answer; the row has its text."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Texts at which the answer is cut."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest(Request):
    """Likelihoods of continuations, as token ids or text; the row has nats and tokens of each."""

    continuations: tuple[list[int] | str, ...]
    labels: tuple[str, ...] = ()
    """What the row's answer is where a continuation is the likeliest; empty: it has no answer."""
    per_token: bool = False
    """The likeliest by the mean over its tokens."""


@dataclass(frozen=True, kw_only=True)
class StatesRequest(Request):
    """Hidden states of a prompt and a continuation; the row has the values that `reduce` makes of them."""

    prompt: Prompt
    continuation: list[int]
    reduce: Callable[[NDArray[np.float64], NDArray[np.int64], int], list[float]]
    """A function of a module: of the states (layers + 1, T, D), the positions of image tokens, and the number of tokens
    of the continuation, which come last."""


@dataclass(frozen=True)
class Units:
    """What a metric is a statistic of: items, or others such as images."""

    names: tuple[str, ...]
    """(N,), distinct. Models are compared unit by unit under these names."""
    groups: tuple[str, ...]
    """(N,); units of one group are not independent."""
    slices: tuple[tuple[str, ...], ...] = ()
    """(N,), or empty: the slices that hold each unit."""

    @classmethod
    def of(cls, rows: Sequence[ItemRow]) -> "Units":
        """The items of rows, each of which has one."""
        return cls(tuple(row.item for row in rows), tuple(row.group for row in rows), tuple(row.slices for row in rows))


@dataclass(frozen=True)
class MetricValues:
    """The values of which a metric is a statistic. `scoring` makes a number with an interval of them."""

    name: str
    """The benchmark's kind, or KIND_MEASURE; ends in `_official` or `_corrected` where these two columns differ."""
    units: Units
    values: FloatArray
    """(N,), or (N, K) for a statistic of several columns."""
    statistic: Statistic = "mean"
    role: MetricRole = "model"
    unit: str = "share"
    lower_is_better: bool = False
    layer: int | None = None
    """The layer of the language model; None: the metric is not of a layer."""
    gap: bool = True
    """Whether the gap between the model and its control is a metric too."""


class BenchmarkModule(Protocol):
    """A benchmark; `config` is its own config class in each function.

    A benchmark on official files may also have `official_files(items, rows, config) -> dict[str, bytes]`: the content
    of each result or upload file by its official name. One with a train file may have `train_items(source, config)`:
    its items, as by `read`, with the answers that demonstrations show.
    """

    REVISION: int
    """Raised when the items, scores or metrics change for the same model and files."""

    def read(self, source: Any, config: Any) -> Iterable[Item]:
        """The items in their official order. `source` is the folder of the official files, or a `HeldOut`.

        Raises ValueError, which names file and way out, where the source cannot give them.
        """

    def requests(self, items: Sequence[Any], config: Any, tokenizer: LazyTokenizer) -> Iterable[Request]:
        """Requests of the items; (item, condition, rotation) names each."""

    def score(self, items: Sequence[Any], rows: Sequence[ItemRow], config: Any) -> Sequence[Mapping[str, float]]:
        """The scores of each row by column, empty where a row is not scored itself.

        A failed row has no answer (None): it is given only where it counts, and then scores as a wrong answer.
        """

    def metrics(self, items: Sequence[Any], rows: Sequence[ItemRow], config: Any) -> Sequence[MetricValues]:
        """The values of each metric, from the rows that count."""


def benchmark_of(kind: str) -> BenchmarkModule:
    """The module of a kind of benchmark. Raises ValueError for a kind that no installed package has."""
    return cast("BenchmarkModule", module_of("vila_ops.benchmarks", BENCHMARKS, kind))


def plugin_of(kind: str) -> dict[str, Any] | None:
    """Package, version and revision of a third-party benchmark; None for one of ours."""
    return provenance("vila_ops.benchmarks", BENCHMARKS, kind)
