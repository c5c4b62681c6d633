from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vila_ops.config.sources import Placement
from vila_ops.data.records import EMPTY_SYSTEM, FIRST_ANSWER, Image
from vila_ops.data.sources.conversations import prompt_beside
from vila_ops.data.sources.faults import Fault
from vila_ops.data.sources.turns import Conversation, Slot, conversation, with_images

Json = dict[str, Any]
ANSWER = {"role": "assistant", "content": "Blue."}
SHOWN = "<image>"


def llava(*said: str) -> list[Json]:
    """Turns of human and gpt."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]


def as_text(made: Conversation) -> list[str]:
    """Each turn as text, an image as [its number] or [its address]."""
    return [
        "".join(
            f"[{part.index if part.address is None else part.address}]" if isinstance(part, Slot) else part
            for part in parts
        )
        for _, parts in made.turns
    ]


@pytest.mark.parametrize(
    ("said", "images", "placed"),
    [
        # worked out with NVlabs/VILA's preprocess_multimodal: of v1.0 where a turn has one image
        (["Q?\n<image>", "A"], 1, ["[0]\nQ?", "A"]),
        (["<image>\nQ?", "A"], 1, ["[0]\nQ?", "A"]),
        (["<image>Q? ", "A"], 1, ["[0]\nQ?", "A"]),
        (["See <image> here", "A"], 1, ["[0]\nSee  here", "A"]),
        (["<image>", "A"], 1, ["[0]", "A"]),
        (["Q?\n<image>", "A", " And <image>\n\n", "B"], 2, ["[0]\nQ?", "A", "[1]\nAnd", "B"]),
        # and of branch vila1.5 where it has several, or where the record has an image and no turn has
        (["1: <image>\n2: <image>\nWhat differs?", "A"], 2, ["1: [0]\n2: [1]\nWhat differs?", "A"]),
        (["<image><image>Q?", "A"], 2, ["[0]\n [1]\nQ?", "A"]),
        (["Q? <image> <image>", "A"], 2, ["Q? [0]\n [1]", "A"]),
        ([" Q?", " A "], 1, ["[0]\nQ?", " A "]),
        # the frames of a video, of which no turn has a place, as in its LazySupervisedDataset
        (["Q?", "A"], 3, ["[0]\n[1]\n[2]\nQ?", "A"]),
        ([" Q? ", "A"], 0, [" Q? ", "A"]),
    ],
)
def test_vilas_placement(said: list[str], images: int, placed: list[str]) -> None:
    assert as_text(conversation(llava(*said), images, placement="vila")) == placed


def test_images_stay_as_they_are_written_and_without_a_place_llavas_are_refused() -> None:
    made = conversation(llava("See\n<image> \n", "A", "<image><image>", "B"), 3)
    assert as_text(made) == ["See\n[0] \n", "A", "[1][2]", "B"]
    with pytest.raises(Fault, match="0 of <image> for 1 images") as raised:
        conversation(llava("Q?", "A"), 1)
    assert raised.value.reason == "too_few_placeholders"


def test_images_of_messages_without_a_place_come_before_the_first_question() -> None:
    """As TRL's prepare_multimodal_messages and ms-swift's _add_default_tags have it."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}, ANSWER]
    assert as_text(conversation(messages, 2)) == ["Be brief.", "[0][1]Q?", "Blue."]
    pairs = [{"user": "Q?", "assistant": "A"}, {"user": "<image>?", "assistant": "B"}]
    assert as_text(conversation(pairs, 1)) == ["[0]Q?", "A", "<image>?", "B"]


@pytest.mark.parametrize("written", ["<image1>", "<image_1>", "<image 2>", "<IMAGE-1>"])
def test_numbered_placeholders_are_not_taken_for_text(written: str) -> None:
    with pytest.raises(Fault, match=f"'{written}' is no placeholder; write <image>, in order"):
        conversation([{"role": "user", "content": f"In {written}?"}, ANSWER], 2)
    assert as_text(conversation([{"role": "user", "content": f"In {written}?"}, ANSWER], 0))[0] == f"In {written}?"


def test_a_placeholder_is_text_in_a_record_that_has_no_images() -> None:
    messages = [{"role": "user", "content": "What is <image> in HTML?"}, ANSWER]
    assert as_text(conversation(messages, 0, placeholders=False)) == ["What is <image> in HTML?", "Blue."]
    with pytest.raises(Fault, match="1 of <image> for 0 images"):
        conversation(messages, 0)


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        ({"type": "image"}, "[0]"),
        ({"type": "image", "index": None, "text": None}, "[0]"),
        ({"type": "image", "index": 0, "text": ""}, "[0]"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "[a.png]"),
        ({"type": "image_url", "image_url": "a.png"}, "[a.png]"),
        ({"type": "image", "image": "file:///data/a.png", "max_pixels": 50176}, "[file:///data/a.png]"),
        ({"image": "a.png"}, "[a.png]"),
        ({"type": "image", "url": "a.png"}, "[a.png]"),
        ({"type": "image", "path": "a.png"}, "[a.png]"),
        ({"type": "image", "image": {"path": "a.png", "bytes": None}}, "[a.png]"),
        ({"type": "image", "image": "data:image;base64,AAAA"}, "[data:image;base64,AAAA]"),
        ({"type": "image", "base64": "AAAA"}, "[data:;base64,AAAA]"),
    ],
)
def test_the_parts_of_openai_trl_transformers_and_qwen(part: Json, shown: str) -> None:
    messages = [{"role": "user", "content": ["Is ", part, {"text": "this it?"}]}, ANSWER]
    assert as_text(conversation(messages, int(shown == "[0]"))) == [f"Is {shown}this it?", "Blue."]


def shown(index: int | None) -> Json:
    return {"index": index, "text": None, "type": "image"}


def said(text: str) -> Json:
    return {"index": None, "text": text, "type": "text"}


@pytest.mark.parametrize(
    ("content", "images", "wanted"),
    [
        ([shown(1), said("?"), shown(0)], [b"red", b"blue"], (Image(b"blue"), "?", Image(b"red"))),
        ([shown(0), said("and"), shown(0)], [b"red"], (Image(b"red"), "and", Image(b"red"))),
        ([shown(None), said("?"), shown(None)], [b"red", b"blue"], (Image(b"red"), "?", Image(b"blue"))),
    ],
)
def test_the_index_of_an_image_part_says_which_image_it_is(
    content: list[Json], images: list[bytes], wanted: tuple[Any, ...]
) -> None:
    turns, _ = with_images([{"role": "user", "content": content}, ANSWER], [Image(data) for data in images])
    assert turns[0].parts == wanted


@pytest.mark.parametrize(
    ("content", "images", "reason", "told"),
    [
        ([shown(2), shown(0)], 2, "too_many_placeholders", "indices [2, 0], but there are 2"),
        ([shown(-1)], 1, "too_many_placeholders", "indices [-1]"),
        ([shown(0)], 0, "too_many_placeholders", "there are 0"),
        ([shown(1), shown(1)], 2, "too_few_placeholders", "no part of a message has the index 0, of 2 images"),
        ([shown(0), shown(None)], 2, "malformed_turns", "some images have an `index` and some have none"),
        ([shown(None)], 2, "too_few_placeholders", "1 of <image> for 2"),
        ([{"type": "image", "index": "0"}], 1, "malformed_turns", "a part is of type text or image_url"),
        ([{"type": "image", "image": "a.png", "text": "lost"}], 0, "malformed_turns", "a part is of type"),
        ([{"type": "text", "text": "Q?", "image": "a.png"}], 0, "malformed_turns", "a part is of type"),
        ([{"type": "image", "image": "a.png", "url": "b.png"}], 0, "malformed_turns", "a part is of type"),
        ([{"type": "image", "image": "a.png"}], 1, "too_few_placeholders", "0 of <image> for 1"),
        ([{"type": "video", "video": "v.mp4"}], 0, "video", "sample its frames"),
        ([{"video": "v.mp4"}], 0, "video", "sample its frames"),
        ([{"type": "audio", "audio": "a.wav"}], 0, "malformed_turns", "a part is of type"),
        ([7], 0, "malformed_turns", "message 1 has 7"),
    ],
)
def test_parts_that_are_not_certain_refuse_the_record(content: list[Any], images: int, reason: str, told: str) -> None:
    with pytest.raises(Fault) as raised:
        conversation([{"role": "user", "content": [*content, said("?")]}, ANSWER], images)
    assert raised.value.reason == reason
    assert told in str(raised.value)


@pytest.mark.parametrize("placement", ["as_written", "vila"])
def test_a_first_turn_of_the_assistant_is_left_out_and_noted(placement: Placement) -> None:
    """As LLaVA's preprocess_v1, which skips "the first one if it is not from human"."""
    greeted = [{"from": "gpt", "value": "Hello."}, *llava("<image>\nQ?", "A")]
    made = conversation(greeted, 1, placement=placement)
    assert (as_text(made), made.notes) == (["[0]\nQ?", "A"], (FIRST_ANSWER,))
    system = [{"from": "system", "value": "Be brief."}, *greeted]
    assert as_text(conversation(system, 1, placement=placement)) == ["Be brief.", "[0]\nQ?", "A"]


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([{"from": "gpt", "value": "<image> Hello."}, *llava("Q?", "A")], "the assistant's and has an image"),
        (
            [*llava("Q?", "A")[::-1], {"from": "gpt", "value": "B"}, {"from": "gpt", "value": "C"}],
            "user, assistant, assis",
        ),
        ([{"from": "gpt", "value": "Hello."}], "here assistant"),
        ([{"from": "gpt", "value": "1"}, {"from": "gpt", "value": "2"}, *llava("Q?", "A")], "here assistant, user"),
    ],
)
def test_only_the_first_turn_is_left_out(turns: list[Json], told: str) -> None:
    with pytest.raises(Fault, match=told) as raised:
        conversation(turns, 1 if "<image>" in str(turns) else 0)
    assert raised.value.reason == "turn_order"


@pytest.mark.parametrize("empty", ["", None, [], [{"type": "text", "text": ""}]])
def test_a_system_turn_without_text_is_left_out_and_noted(empty: Any) -> None:
    made = conversation([{"role": "system", "content": empty}, {"role": "user", "content": "Q?"}, ANSWER], 0)
    assert (as_text(made), made.notes) == (["Q?", "Blue."], (EMPTY_SYSTEM,))


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "tool", "content": "4"}, "tool_call"),
        ({"from": "observation", "value": "4"}, "tool_call"),
        ({"role": "assistant", "content": "4", "loss": False}, "weight"),
        ({"role": "assistant", "content": "4", "loss_scale": 0.5}, "weight"),
        ({"from": "gpt", "value": "4", "weight": 0}, "weight"),
        ({"from": "gpt", "value": "4", "training": False}, "weight"),
        ({"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}, "malformed_turns"),
        ({"role": "assistant", "content": "4", "reasoning": "2 + 2"}, "malformed_turns"),
        ({"role": "assistant", "content": "4", "thinking": "2 + 2"}, "malformed_turns"),
        ({"role": "assistant", "content": "4", "images": ["a.png"]}, "unread_media"),
        ({"from": "gpt", "value": "4", "video": "v.mp4"}, "video"),
        ({"role": "assistant", "content": "4", "audio": {"id": "audio_1"}}, "unread_media"),
        ({"role": ["assistant"], "content": "4"}, "unknown_role"),
        ({"role": "assistant"}, "malformed_turns"),
        ({"speaker": "gpt"}, "malformed_turns"),
        ("4", "malformed_turns"),
    ],
)
def test_a_turn_of_which_something_would_be_lost_refuses_the_record(turn: Any, reason: str) -> None:
    with pytest.raises(Fault) as raised:
        conversation([{"role": "user", "content": "Q?"}, turn], 0)
    assert raised.value.reason == reason
    assert "ignore" not in str(raised.value)  # a setting about the keys of records
    neutral = {**ANSWER, "weight": 1, "loss": True, "reasoning_content": "", "thinking": None, "images": [],
               "video": None, "name": "x"}  # fmt: skip
    assert as_text(conversation([{"role": "user", "content": "Q?"}, neutral], 0)) == ["Q?", "Blue."]


def test_a_system_prompt_beside_the_turns_comes_before_them() -> None:
    """hiyouga/LlamaFactory#2464, and the data format of its README; ms-swift's `system` is the same."""
    said = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]
    assert conversation(said, 0, system="Be brief.").turns == (
        ("system", ("Be brief.",)),
        ("user", ("Q?",)),
        ("assistant", ("A",)),
    )
    for none in (None, ""):
        assert as_text(conversation(said, 0, system=none)) == ["Q?", "A"]
    with pytest.raises(Fault, match="here system, system, user") as raised:
        conversation([{"from": "system", "value": "Be long."}, *said], 0, system="Be brief.")
    assert raised.value.reason == "turn_order"
    with pytest.raises(Fault, match="`system` is 7; it is the text of the system prompt"):
        conversation(said, 0, system=7)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"tools": '[{"name": "get_weather"}]'}, "tool_call"),
        ({"tools": [{"name": "get_weather"}]}, "tool_call"),
        ({"chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}}, "preference"),
        ({"rejected_response": "B"}, "preference"),
        ({"label": False}, "preference"),
        ({"kto_tag": False}, "preference"),
        ({"objects": {"ref": ["a dog"], "bbox": [[1, 2, 3, 4]]}, "turns": "At <bbox>."}, "unfilled_boxes"),
    ],
)
def test_what_a_record_says_beside_its_turns_is_not_lost(beside: Json, reason: str) -> None:
    """hiyouga/LlamaFactory#4152 and #4187 (tools), modelscope/ms-swift#5934 (preferences, boxes)."""
    with pytest.raises(Fault, match=r"set `ignore: \[") as raised:
        prompt_beside(beside, ())
    assert raised.value.reason == reason
    prompt_beside(beside, tuple(beside))


def test_what_changes_nothing_beside_the_turns_is_let_pass() -> None:
    prompt_beside({"tools": "[]", "rejected": None, "label": True, "objects": {"bbox": [[1, 2, 3, 4]]}}, ())
    prompt_beside({"tools": [], "chosen": "", "label": 3, "kto_tag": True, "system": "Be brief."}, ())


words = st.lists(st.sampled_from([SHOWN, "a", " ", "\n", "ima", "<", "ge>"]), min_size=1, max_size=5).map("".join)


@given(
    said=st.lists(words, min_size=2, max_size=6),
    images=st.integers(0, 6),
    placement=st.sampled_from(["as_written", "vila"]),
)
def test_each_image_is_shown_once_in_order_or_the_record_is_refused(
    said: Sequence[str], images: int, placement: Placement
) -> None:
    places = sum(text.count(SHOWN) for text in said)
    made, reason = None, ""
    try:
        made = conversation(llava(*said), images, placement=placement)
    except Fault as fault:
        reason = fault.reason
    if made is None:
        counted = "too_few_placeholders" if places < images else "too_many_placeholders"
        assert reason in ("turn_order", "no_text", counted)
        return
    assert [slot.index for slot in made.slots] == list(range(images))
    assert places == images or (placement == "vila" and places == 0)
    spoken = "".join(part for _, parts in made.turns for part in parts if isinstance(part, str))
    assert spoken.split() == "".join(said).replace(SHOWN, "").split() or placement == "vila"
