"""The register of the aliases: one linear history and one champion, whoever races, stops or loses an answer."""

import os

import pytest

from tests.racing import racers
from vila_ops.artifacts.kinds import Checkpoint, ModelVersion
from vila_ops.artifacts.store import address, backend, begin, seal
from vila_ops.errors import CorruptArtifact, PromotionRaceLost, is_final
from vila_ops.registry import alias_register
from vila_ops.registry.alias_register import go_back, move, place_of, read, remove
from vila_ops.registry.aliases import CHALLENGER, CHAMPION, PREVIOUS

ROUNDS = int(os.environ.get("VILA_PROMOTIONS", "12"))
"""Of each promoter in a race."""
NAME = "a model's name/../with %"
"""A name that is no path."""


def version(number: int) -> ModelVersion:
    checkpoint = Checkpoint(uri=f"/store/checkpoint/{number}", digest=f"{number:064x}", stage="sft", step=number)
    return ModelVersion(name=NAME, version=number, checkpoint=checkpoint, promoted=False)


def sealed(store: str, number: int) -> ModelVersion:
    at = address(Checkpoint, revision=1, recipe={"number": number}, parents=())
    attempt = begin(at, store=store)
    (attempt / "weights").write_text(str(number))
    checkpoint = seal(Checkpoint, at, attempt, facts={"stage": "sft", "step": 1}, execution={})
    return ModelVersion(name=NAME, version=number, checkpoint=checkpoint, promoted=False)


def promote(store: str, number: int, *, over: int | None) -> None:
    move(NAME, {CHAMPION: version(number)}, over=over, reason="better", store=store)


def test_every_move_is_in_the_history_with_the_aliases_after_it(store: str) -> None:
    assert read(NAME, store=store).aliases() == {}
    promote(store, 1, over=None)
    move(NAME, {CHALLENGER: version(2)}, over=1, reason="may be better", store=store)
    promote(store, 2, over=1)
    record = read(NAME, store=store)
    assert [(one.number, one.reason, one.aliases) for one in record.history] == [
        (1, "better", {"champion": 1}),
        (2, "may be better", {"champion": 1, "challenger": 2}),
        (3, "better", {"champion": 2, "previous": 1}),
    ]
    served = record.model_version(NAME, CHAMPION)
    assert served == ModelVersion(**{**version(2).model_dump(), "promoted": True})
    assert record.model_version(NAME, PREVIOUS) == version(1)
    assert record.model_version(NAME, CHALLENGER) is None
    assert read("another name", store=store).history == ()


def test_a_move_that_another_process_made_is_not_made_again(store: str) -> None:
    """Two processes that judged the same version against no champion."""
    promote(store, 1, over=None)
    promote(store, 1, over=None)
    assert [one.aliases for one in read(NAME, store=store).history] == [{"champion": 1}]


def test_a_promoter_that_was_stopped_between_its_look_and_its_move_loses(store: str) -> None:
    promote(store, 1, over=None)
    promote(store, 2, over=1)
    for stale in (None, 1):
        with pytest.raises(PromotionRaceLost, match=f"became version 2 while version 3 .* version {stale}") as lost:
            promote(store, 3, over=stale)
        assert not is_final(lost.value)
    assert read(NAME, store=store).aliases() == {"champion": 2, "previous": 1}


def test_a_move_whose_answer_was_lost_is_made_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf:
        """Stores, and says that it did not."""

        load = staticmethod(backend(store).load)

        @staticmethod
        def swap(*asked: str) -> None:
            assert backend(store).swap(*asked) is not None  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(alias_register, "backend", lambda _: Deaf)
        promote(store, 1, over=None)
    assert [one.number for one in read(NAME, store=store).history] == [1]


def race(store: str, own: int) -> tuple[list[tuple[int | None, int]], int]:
    """Promote over whoever is champion, again and again. Return each move (former, new), and how many were lost."""
    won, lost = [], 0
    for turn in range(ROUNDS):
        before = read(NAME, store=store).version(CHAMPION)
        try:
            promote(store, 2 * turn + own + 1, over=before)
            won.append((before, 2 * turn + own + 1))
        except PromotionRaceLost:
            lost += 1
    return won, lost


@pytest.mark.slow
def test_two_promoters_that_race_leave_a_linear_history_and_one_champion(store: str) -> None:
    """Their moves, as they tell them, are the edges of one path: every champion was replaced by one other."""
    with racers(2) as pool:
        told = list(pool.map(race, [store] * 2, range(2)))
    won = [one for moves, _ in told for one in moves]
    assert len(won) + sum(lost for _, lost in told) == 2 * ROUNDS
    successor = dict(won)
    assert len(successor) == len(won), "two versions replaced one champion"
    path = _path(successor)
    assert len(path) == len(won)
    record = read(NAME, store=store)
    assert [one.aliases["champion"] for one in record.history] == path
    assert [one.number for one in record.history] == list(range(1, len(path) + 1))
    assert [one.aliases.get("previous") for one in record.history] == [None, *path[:-1]]


def _path(successor: dict[int | None, int]) -> list[int]:
    """The champions after nobody, each the successor of the one before."""
    path: list[int] = []
    while (after := successor.get(path[-1] if path else None)) is not None:
        path.append(after)
    return path


def test_one_call_goes_back_and_a_second_one_undoes_it(store: str) -> None:
    with pytest.raises(ValueError, match="has no previous champion to go back to"):
        go_back(NAME, reason="worse in use", store=store)
    for number in (1, 2):
        over = number - 1 or None
        move(NAME, {CHAMPION: sealed(store, number)}, over=over, reason="better", store=store)
    assert go_back(NAME, reason="worse in use", store=store).aliases() == {"champion": 1, "previous": 2}
    assert go_back(NAME, reason="it was not", store=store).aliases() == {"champion": 2, "previous": 1}
    assert [one.reason for one in read(NAME, store=store).history[2:]] == ["worse in use", "it was not"]
    assert remove(NAME, reason="another registry", store=store).aliases() == {}


def test_nobody_goes_back_to_weights_that_are_gone(store: str) -> None:
    promote(store, 1, over=None)
    promote(store, 2, over=1)
    with pytest.raises(CorruptArtifact, match=r"/store/checkpoint/1 has no manifest\.json"):
        go_back(NAME, reason="worse in use", store=store)
    assert read(NAME, store=store).version(CHAMPION) == 2


def test_a_register_of_something_else_is_named(store: str) -> None:
    place = place_of(NAME, store=store)
    backend(place).swap(place, b"[]", None)
    with pytest.raises(CorruptArtifact, match="is not a register of aliases"):
        read(NAME, store=store)
