"""Requests join and leave between steps; what they get is what stock transformers gives them alone."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vila_ops.artifacts.store import content
from vila_ops.config import Model, Resources
from vila_ops.config.images import Webp
from vila_ops.data.images import square
from vila_ops.data.records import Image
from vila_ops.generate.engine import EngineOptions
from vila_ops.generate.request import Delta, Prompt, Sampling
from vila_ops.generate.torch_engine.image_features import RecentFeatures, SaltedImage
from vila_ops.generate.torch_engine.loaded_model import LoadedModel, read_model
from vila_ops.generate.torch_engine.reading_pace import ReadingPace
from vila_ops.generate.torch_engine.request_state import GenerationRequest
from vila_ops.generate.torch_engine.scheduler import Event, Scheduler
from vila_ops.model import folder as model_folder
from vila_ops.model.assemble import assemble
from vila_ops.model.pixels import Pixels

WORDS = [
    "what",
    "colour",
    "is",
    "the",
    "dog",
    "and",
    "where",
    "does",
    "it",
    "go",
    "now",
    "that",
    "red",
    "apples",
    "are",
    "on",
    "a",
    "table",
    "near",
    "us",
    "today",
]
NEAR_TIE = 1e-4
"""Nats: rounding differs between batches, so a token may be another one whose likelihood is as close as this."""


@pytest.fixture(scope="module")
def folder(
    make_model: Callable[..., Model], make_resources: Callable[..., Resources], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model whose answers vary: a random one repeats a token, unless its weights are large."""
    root = tmp_path_factory.mktemp("scheduler")
    base = content(assemble(make_model(), make_resources(root)))
    model = model_folder.load(base)
    with torch.no_grad():
        for parameter in (*model.model.language_model.layers.parameters(), *model.lm_head.parameters()):
            if parameter.dim() == 2:
                parameter.mul_(8)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.mul_(8)
    (root / "model").mkdir()
    model_folder.save(model, root / "model", processor=AutoProcessor.from_pretrained(base))
    return root / "model"


@pytest.fixture(scope="module")
def loaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return read_model(folder, EngineOptions(tmp_path_factory.mktemp("features")))


@pytest.fixture(scope="module")
def stock(folder: Path) -> LlavaForConditionalGeneration:
    """The same weights in the class of transformers."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pixels(folder: Path) -> Pixels:
    """From encoded squares, by the numbers that transformers reads in the folder."""
    processor = AutoProcessor.from_pretrained(folder).image_processor
    return Pixels(tuple(processor.image_mean), tuple(processor.image_std))


@pytest.fixture(scope="module")
def images(loaded: LoadedModel, tiny: Path) -> list[bytes]:
    side = loaded.model.config.vision_side
    return [
        square(path.read_bytes(), size=side, fit=loaded.image_aspect_ratio, encoding=Webp())
        for path in sorted((tiny / "pairs").glob("*.png"))[:4]
    ]


def prompt(loaded: LoadedModel, number: int, images: Sequence[bytes] = ()) -> Prompt:
    """A question of its own length for each number, after its images."""
    words = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(1 + 7 * number % 23))
    return Prompt(loaded.tokenizer.prompt([("user", (*map(Image, images), words))]), tuple(images))


def many(loaded: LoadedModel, images: list[bytes], count: int) -> list[Prompt]:
    """Prompts of mixed lengths with 0 to 3 images each."""
    return [prompt(loaded, n, [images[(n + k) % len(images)] for k in range(n % 4)]) for n in range(count)]


def scheduler(loaded: LoadedModel, **changes: Any) -> Scheduler:
    return Scheduler(loaded, **{"slots": 5, "cache_tokens": 4096, "prefill_tokens": 512, **changes})


def run(made: Scheduler, arrivals: Sequence[GenerationRequest]) -> list[list[int]]:
    """The answers of requests that come together."""
    ids: dict[GenerationRequest, list[int]] = {request: [] for request in arrivals}
    for request, delta in all_events(made, arrivals):
        assert isinstance(delta, Delta), delta
        ids[request] += delta.ids
    return list(ids.values())


def requests(prompts: Sequence[Prompt], max_new_tokens: int, **settings: Any) -> list[GenerationRequest]:
    """Each with its number as the seed, up to the number of tokens."""
    return [
        GenerationRequest(one, Sampling(max_new_tokens, frozenset(), seed=number, **settings))
        for number, one in enumerate(prompts)
    ]


def cached(events: Sequence[Event], arrivals: Sequence[GenerationRequest]) -> list[int]:
    """The cached tokens of each request."""
    return [sum(delta.cached_tokens for delta in of(request, events)) for request in arrivals]


def all_events(made: Scheduler, arrivals: Sequence[GenerationRequest]) -> list[Event]:
    """What happens until requests that come together have ended."""
    events = made.step(arrivals)
    while made.is_busy:
        events += made.step()
    return events


def of(request: GenerationRequest, events: Sequence[Event]) -> list[Delta]:
    """The deltas of one request."""
    return [delta for one, delta in events if one is request and isinstance(delta, Delta)]


def test_greedy_answers_to_100_prompts_are_those_of_stock_generate(
    stock: LlavaForConditionalGeneration, pixels: Pixels, loaded: LoadedModel, images: list[bytes]
) -> None:
    """In fp32, read in pieces, five at a time; where they part, the two tokens are a near-tie for stock."""
    prompts = many(loaded, images, 100)
    answers = run(scheduler(loaded, prefill_tokens=48), requests(prompts, 6))
    assert len({tuple(answer) for answer in answers}) > 50
    beyond = range(len(loaded.tokenizer.fast), stock.config.text_config.vocab_size)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": -1, "pad_token_id": 0}
    for one, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([one.input_ids])
        shown = {"pixel_values": pixels(one.images)} if one.images else {}
        with torch.no_grad():
            out = stock.generate(
                ids, attention_mask=torch.ones_like(ids), suppress_tokens=[loaded.tokenizer.image_id, *beyond],
                output_scores=True, return_dict_in_generate=True, **shown, **settings,
            )  # fmt: skip
        theirs = out.sequences[0, ids.shape[1] :].tolist()
        if answer != theirs:
            at = next(place for place in range(6) if answer[place] != theirs[place])
            nats = out.scores[at][0].log_softmax(-1)
            assert float(nats[theirs[at]] - nats[answer[at]]) < NEAR_TIE, (answer, theirs)


def test_log_probabilities_are_those_of_one_full_forward_of_stock(
    stock: LlavaForConditionalGeneration, pixels: Pixels, loaded: LoadedModel, images: list[bytes]
) -> None:
    """In fp32, of greedy and of drawn tokens, read in pieces, five at a time, some behind what was read before."""
    prompts = many(loaded, images, 16)
    arrivals = [*requests(prompts, 6, logprobs=5), *requests(prompts, 6, logprobs=5, temperature=1.0)]
    events = all_events(scheduler(loaded, prefill_tokens=48, prefix_tokens=2048), arrivals)
    assert any(cached(events, arrivals))
    barred = [loaded.tokenizer.image_id, *range(len(loaded.tokenizer.fast), stock.config.text_config.vocab_size)]
    for request in arrivals:
        reports = [report for delta in of(request, events) for report in delta.logprobs]
        answer = [report.id for report in reports]
        assert answer == [token for delta in of(request, events) for token in delta.ids]
        assert len(answer) == 6
        ids, shown = [*request.prompt.input_ids, *answer[:-1]], request.prompt.images
        with torch.no_grad():
            logits = stock(torch.tensor([ids]), pixel_values=pixels(shown) if shown else None).logits[0]
        nats = logits[len(request.prompt.input_ids) - 1 :].log_softmax(-1)
        for report, row in zip(reports, nats, strict=True):
            assert report.logprob == pytest.approx(float(row[report.id]), abs=NEAR_TIE)
            tokens, values = zip(*report.top, strict=True)
            assert values == pytest.approx(row[list(tokens)].tolist(), abs=NEAR_TIE)
            row[barred] = -torch.inf
            assert values == pytest.approx(row.topk(5).values.tolist(), abs=NEAR_TIE)


def test_sampled_answers_do_not_depend_on_what_shares_their_batch(loaded: LoadedModel, images: list[bytes]) -> None:
    prompts = many(loaded, images, 12)
    settings = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.2}
    alone = [run(scheduler(loaded, slots=1), [one])[0] for one in requests(prompts, 8, **settings)]
    assert run(scheduler(loaded), requests(prompts, 8, **settings)) == alone
    assert run(scheduler(loaded, slots=3, prefill_tokens=9), requests(prompts, 8, **settings)) == alone
    assert len({tuple(answer) for answer in alone}) == len(alone)


def test_an_aborted_request_frees_its_place_within_one_step(loaded: LoadedModel, images: list[bytes]) -> None:
    made = scheduler(loaded, slots=2, prefill_tokens=4)
    decoded, read, waiting = requests([prompt(loaded, 3), prompt(loaded, 6, images), prompt(loaded, 1)], 50)
    events = made.step([decoded])
    while not of(decoded, events):
        events += made.step()
    made.step([read, waiting])
    assert [state.request for state in made.rows] == [decoded, read]
    for request in (decoded, read, waiting):
        request.aborted = True
        assert of(request, made.step()) == [Delta([], "abort")]
        assert request not in [state.request for state in made.rows]
    assert not made.is_busy
    assert made.cache.keys == []


def test_a_request_joins_between_the_tokens_of_another(loaded: LoadedModel) -> None:
    made = scheduler(loaded)
    long, short = requests([prompt(loaded, 3), prompt(loaded, 4)], 40)
    events = made.step([long])
    while len(of(long, events)) < 3:
        events += made.step()
    joined = made.step([short])
    while not of(short, joined):
        joined += made.step()
    assert len(of(long, joined)) <= 1
    assert made.live == 2


def test_new_images_and_long_prompts_are_read_in_pieces_between_the_tokens_of_others(
    loaded: LoadedModel, images: list[bytes]
) -> None:
    features = RecentFeatures(loaded.model, Pixels((0.5,) * 3, (0.5,) * 3), max_images=8)
    recent = LoadedModel(loaded.model, loaded.device, loaded.tokenizer, features, loaded.image_aspect_ratio)
    made = scheduler(recent, prefill_tokens=16)
    answering, reading = requests([prompt(loaded, 3), prompt(loaded, 5, images)], 60)
    events = made.step([answering])
    while not of(answering, events):
        events += made.step()
    steps, arrivals = [], [reading]
    with counted(loaded) as seen:
        while not any(of(reading, events) for events, _ in steps):
            before = features.num_computed
            steps.append((made.step(arrivals), features.num_computed - before))
            arrivals = []
    has_token = [bool(of(answering, events)) for events, _ in steps]
    assert all(one or other for one, other in itertools.pairwise(has_token))
    assert [computed for _, computed in steps if computed] == [1] * len(images)
    assert has_token.count(False) == len(images)
    whole, rest = divmod(len(reading.prompt.input_ids), 16)
    assert rest
    assert [count for count in seen if count > 1] == [1 + 16] * whole + [1 + rest], "with a token of the other answer"


class OneLayer(ReadingPace):
    def seconds(self, to_read: int, answers: int) -> float:
        return 0.0


def test_while_there_are_answers_the_tower_computes_a_few_layers_at_a_time(
    loaded: LoadedModel, images: list[bytes]
) -> None:
    features = RecentFeatures(loaded.model, Pixels((0.5,) * 3, (0.5,) * 3), max_images=8)
    recent = LoadedModel(loaded.model, loaded.device, loaded.tokenizer, features, loaded.image_aspect_ratio)
    prompts = [prompt(loaded, 3), prompt(loaded, 5, images[:1]), prompt(loaded, 6, images[1:3])]
    expected = [run(scheduler(recent), [one])[0] for one in requests(prompts, 40)]
    features._kept.clear()
    made = scheduler(recent, bound_pauses=True)
    made.pace = OneLayer(max_tokens=512)
    first, aborted, last = requests(prompts, 40)
    events = made.step([first])
    while not of(first, events):
        events += made.step()
    layers = loaded.model.config.vision_config.num_hidden_layers
    assert layers > 1
    events += made.step([aborted])
    assert features._unfinished is not None
    aborted.aborted = True
    steps = [made.step([last])]
    while not of(last, [event for events in steps for event in events]):
        steps.append(made.step())
    without = [events for events in steps if not of(first, events)]
    assert len(without) == 2 * (layers + 1), "the layers of two images, and what comes before the first layer"
    assert all(of(first, one) or of(first, other) for one, other in itertools.pairwise(steps))
    assert features._unfinished is None
    assert features.num_computed == 3 + 1 + 2
    events += [event for events in steps for event in events] + all_events(made, [])
    assert [[token for delta in of(one, events) for token in delta.ids] for one in (first, last)] == [
        expected[0],
        expected[2],
    ]


def test_a_tower_that_fails_between_the_tokens_of_others_ends_its_request_alone(
    loaded: LoadedModel, images: list[bytes]
) -> None:
    features = RecentFeatures(loaded.model, Pixels((0.5,) * 3, (0.5,) * 3), max_images=8)
    recent = LoadedModel(loaded.model, loaded.device, loaded.tokenizer, features, loaded.image_aspect_ratio)
    (expected,) = run(scheduler(recent), requests([prompt(loaded, 3)], 20))
    made = scheduler(recent, bound_pauses=True)
    made.pace = OneLayer(max_tokens=512)
    good, broken = requests([prompt(loaded, 3), prompt(loaded, 5, images[:1])], 20)
    events = made.step([good])
    while not of(good, events):
        events += made.step()

    def fails(_: object) -> None:
        raise RuntimeError("no memory")

    hook = loaded.model.model.vision_tower.register_forward_hook(lambda *given: fails(given))
    events += made.step([broken])
    assert features._unfinished is not None
    events += all_events(made, [])
    hook.remove()
    assert [str(one) for request, one in events if request is broken] == ["no memory"]
    assert [token for delta in of(good, events) for token in delta.ids] == expected


def test_an_image_in_the_tower_is_finished_though_an_earlier_request_joins(
    loaded: LoadedModel, images: list[bytes]
) -> None:
    features = RecentFeatures(loaded.model, Pixels((0.5,) * 3, (0.5,) * 3), max_images=8)
    earlier, later = (SaltedImage(image, "") for image in images[:2])
    assert features.first([later], 0.0) == []
    while features.num_computed < 2:
        assert features.first([earlier, later], 0.0) == []
    assert len(features._kept) == 1
    while len(found := features.first([earlier, later], 0.0)) < 2:
        pass
    assert features.num_computed == 2
    whole = RecentFeatures(loaded.model, Pixels((0.5,) * 3, (0.5,) * 3), max_images=8)
    assert torch.equal(torch.stack(found), whole(images[:2]))


def test_prompts_are_read_at_the_pace_of_answers_only_while_there_are_some(loaded: LoadedModel) -> None:
    class Fixed(ReadingPace):
        def tokens(self, to_read: int, answers: int) -> int:
            return 7

    made = scheduler(loaded, bound_pauses=True)
    made.pace = Fixed(max_tokens=512)
    first, second = requests([prompt(loaded, 3), prompt(loaded, 6)], 40)
    expected = [run(scheduler(loaded), [one])[0] for one in requests([prompt(loaded, 3), prompt(loaded, 6)], 40)]
    with counted(loaded) as seen:
        events = made.step([first])
        while not of(first, events):
            events += made.step()
    assert seen == [len(first.prompt.input_ids)]
    with counted(loaded) as seen:
        events += made.step([second])
        while not of(second, events):
            events += made.step()
    whole, rest = divmod(len(second.prompt.input_ids), 7)
    assert rest
    assert [count for count in seen if count > 1] == [1 + 7] * whole + [1 + rest], "with a token of the first answer"
    events += all_events(made, [])
    assert [[token for delta in of(one, events) for token in delta.ids] for one in (first, second)] == expected


def test_the_cache_never_holds_more_positions_than_it_may(loaded: LoadedModel, images: list[bytes]) -> None:
    made = scheduler(loaded, slots=8, cache_tokens=512, prefill_tokens=64)
    prompts = many(loaded, images, 16)
    limits = [5 if number % 5 else 120 for number in range(16)]
    arrivals = [
        GenerationRequest(one, Sampling(limit, frozenset())) for one, limit in zip(prompts, limits, strict=True)
    ]
    together, events = 0, made.step(arrivals)
    while made.is_busy:
        events += made.step()
        together = max(together, len(made.rows))
        assert made.cache.slots * made.cache.capacity <= 512
        for layer in (*made.cache.keys, *made.cache.values):
            assert layer.shape[0] * (layer.shape[2] - 1) <= 512
    assert together > 1
    for request, limit in zip(arrivals, limits, strict=True):
        deltas = of(request, events)
        assert (sum(len(delta.ids) for delta in deltas), deltas[-1].finish_reason) == (limit, "length")


@contextlib.contextmanager
def counted(loaded: LoadedModel) -> Iterator[list[int]]:
    """The positions that each pass of the language model reads."""
    seen: list[int] = []
    layer = loaded.model.model.language_model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    yield seen
    hook.remove()


def alike(one: Prompt, other: Prompt) -> int:
    """How many first ids are the same."""
    pairs = zip(one.input_ids, other.input_ids, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def salted(one: Prompt, salt: str) -> Prompt:
    return Prompt(one.input_ids, one.images, salt)


def test_a_prompt_is_read_from_where_it_parts_from_an_earlier_one(loaded: LoadedModel, images: list[bytes]) -> None:
    first, second, third = (prompt(loaded, number, images[:2]) for number in (3, 5, 9))
    (answer,) = run(scheduler(loaded), requests([first], 8))
    turn = Prompt([*first.input_ids, *answer, *second.input_ids], first.images + second.images)
    other = Prompt(second.input_ids, (images[0], images[2]))
    asked = [first, second, third, turn, other, salted(second, "of another key"), first]
    expected = [run(scheduler(loaded), requests([one], 8))[0] for one in asked]
    made, answers, hits = scheduler(loaded, prefix_tokens=2048, prefill_tokens=24), [], []
    for one in asked:
        arrivals = requests([one], 8)
        with counted(loaded) as seen:
            events = all_events(made, arrivals)
        hits += cached(events, arrivals)
        answers.append([token for delta in of(arrivals[0], events) for token in delta.ids])
        assert sum(seen) == len(one.input_ids) - hits[-1] + 7
    assert answers == expected
    places = [place for place, token in enumerate(second.input_ids) if token == loaded.tokenizer.image_id]
    assert hits == [
        0,
        alike(second, first),
        max(alike(third, first), alike(third, second)),
        len(first.input_ids) + len(answer) - 1,  # the last token of an answer was not read
        places[loaded.tokenizer.image_tokens],  # the first position of the second image, which is another one
        0,
        len(first.input_ids) - 1,  # the last token of a prompt is always read
    ]


def test_requests_that_come_together_read_what_they_share_once(loaded: LoadedModel, images: list[bytes]) -> None:
    long = Prompt(prompt(loaded, 2, images).input_ids * 3, tuple(images) * 3)
    assert len(long.input_ids) > 128
    made, arrivals = scheduler(loaded, prefix_tokens=4096), requests([long] * 3, 1)
    with counted(loaded) as seen:
        events = all_events(made, arrivals)
    assert cached(events, arrivals) == [0, len(long.input_ids) - 1, len(long.input_ids) - 1]
    assert sum(seen) == len(long.input_ids) + 2


def test_no_more_tokens_are_kept_than_may_be(loaded: LoadedModel, images: list[bytes]) -> None:
    made = scheduler(loaded, prefix_tokens=150)
    expected = run(scheduler(loaded), requests(many(loaded, images, 12), 5))
    assert run(made, requests(many(loaded, images, 12), 5)) == expected
    kept = made.prefixes._kept
    assert 0 < sum(layers[0][0].shape[1] for _, layers in kept) == made.prefixes.num_tokens <= 150


def test_keys_get_places_in_turn(loaded: LoadedModel) -> None:
    made = scheduler(loaded, slots=2)
    keys = ["a", "a", "a", "a", "b", "a", "b"]
    arrivals = requests([salted(prompt(loaded, 1), key) for key in keys], 2)
    order = [request for request, delta in all_events(made, arrivals) if delta.finish_reason]  # type: ignore[union-attr]
    assert [arrivals.index(request) for request in order] == [0, 4, 1, 6, 2, 3, 5]


def test_a_request_that_fails_ends_alone_and_the_others_go_on_from_where_they_were(
    loaded: LoadedModel, images: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    good = [prompt(loaded, 4), prompt(loaded, 5, images[:1]), prompt(loaded, 6, images[1:3])]
    expected = run(scheduler(loaded), requests(good, 9))
    made = scheduler(loaded)
    arrivals = requests(good, 9)
    events = made.step(arrivals)
    while made.live < len(arrivals):
        events += made.step()
    (broken,) = requests([Prompt(good[1].input_ids, (b"no image",))], 9)
    with caplog.at_level(logging.WARNING):
        events += made.step([broken])
        while made.is_busy:
            events += made.step()
    assert [[token for delta in of(request, events) for token in delta.ids] for request in arrivals] == expected
    assert [type(one) for request, one in events if request is broken] == [PIL.UnidentifiedImageError]
    assert "a pass for 4 requests failed" in caplog.text
