"""The rules of the aliases."""

import pytest

from vila_ops.registry.aliases import Alias, aliases_after, champion_after, race_lost, rival_of


@pytest.mark.parametrize(("version", "champion", "rival"), [(1, None, None), (2, 2, None), (3, 2, 2)])
def test_a_version_is_compared_with_the_champion_unless_it_is_the_champion(
    version: int, champion: int | None, rival: int | None
) -> None:
    assert rival_of(version, champion) == rival


def test_only_a_version_that_passed_becomes_the_champion() -> None:
    assert champion_after(3, 2, passed=True) == 3
    assert champion_after(3, 2, passed=False) == 2
    assert champion_after(1, None, passed=False) is None


def test_a_lost_race_names_the_new_champion_and_the_way_out() -> None:
    error = race_lost("vila", version=3, champion=1, now=2)
    assert str(error) == (
        "the champion of vila became version 2 while version 3 was judged against version 1; register again to be "
        "judged against the new one"
    )


@pytest.mark.parametrize(
    ("before", "changes", "after"),
    [
        ({}, {"champion": 1}, {"champion": 1}),
        ({"champion": 1}, {"champion": 2}, {"champion": 2, "previous": 1}),
        ({"champion": 2, "previous": 1}, {"champion": 1}, {"champion": 1, "previous": 2}),
        ({"champion": 1}, {"challenger": 2}, {"champion": 1, "challenger": 2}),
        ({"champion": 1, "challenger": 2}, {"champion": 2}, {"champion": 2, "previous": 1}),
        ({"champion": 1, "challenger": 2}, {"champion": 3}, {"champion": 3, "challenger": 2, "previous": 1}),
        ({"champion": 1, "challenger": 2}, {"challenger": None}, {"champion": 1}),
        ({"champion": 2, "previous": 1}, {"champion": None}, {"previous": 2}),
        ({"champion": 2, "previous": 1}, {"champion": None, "challenger": None, "previous": None}, {}),
    ],
)
def test_a_replaced_champion_is_the_previous_one_and_a_promoted_challenger_is_none(
    before: dict[Alias, int], changes: dict[Alias, int | None], after: dict[Alias, int]
) -> None:
    assert aliases_after(before, changes) == after
