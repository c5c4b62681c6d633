from hypothesis import given, settings
from hypothesis import strategies as st

from vila_ops.eval.benchmark import GenerateRequest, TextPrompt
from vila_ops.eval.shards import SHARD, shards_of

PROMPT = TextPrompt((("user", ("?",)),))
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def asked(sizes: list[int], conditions: tuple[str, ...] = ("matched",)) -> tuple[list[GenerateRequest], dict[str, str]]:
    """Groups of so many items, in turns: the first item of every group, then the second, ..."""
    names = [(place, group) for place in range(max(sizes)) for group, size in enumerate(sizes) if place < size]
    group_of = {f"{group}-{place}": str(group) for place, group in names}
    requests = [
        GenerateRequest(item=item, condition=condition, prompt=PROMPT, max_new_tokens=1)
        for condition in conditions
        for item in group_of
    ]
    return requests, group_of


@given(SIZES)
@settings(max_examples=30)
def test_every_request_is_in_one_shard_and_a_group_is_not_split(sizes: list[int]) -> None:
    requests, group_of = asked(sizes, ("matched", "shuffled"))
    shards = shards_of(requests, group_of)
    assert sorted((one.condition, one.item) for shard in shards for one in shard) == sorted(
        (one.condition, one.item) for one in requests
    )
    places = [{(one.condition, group_of[one.item]) for one in shard} for shard in shards]
    assert sum(map(len, places)) == len(set().union(*places))
    assert all({condition for condition, _ in place} in ({"matched"}, {"shuffled"}) for place in places)


@given(SIZES, SIZES)
@settings(max_examples=30)
def test_a_longer_list_has_the_shards_of_a_shorter_one_but_for_its_last(first: list[int], more: list[int]) -> None:
    short, long = (shards_of(*asked(sizes)) for sizes in (first, [*first, *more]))
    as_items = [[{one.item for one in shard} for shard in shards] for shards in (short, long)]
    assert as_items[0][:-1] == as_items[1][: len(as_items[0]) - 1]


def test_shards_end_with_the_group_that_fills_them() -> None:
    requests, group_of = asked([50] * 6)
    assert [len(shard) for shard in shards_of(requests, group_of)] == [150, 150]
    assert SHARD == 128
