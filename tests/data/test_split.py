from vila_ops.config import Split
from vila_ops.data.split import split_of


def test_sides_are_as_they_were_ever_since() -> None:
    """Golden: a model trained before must not find its test objects in its training data after."""
    names = {"dog": "train", "cat": "test", "pineapple": "validation", "fire engine": "train", "鳥": "test"}
    assert {name: split_of(name, Split()) for name in names} == names
    assert [n for n in range(20) if split_of(f"object {n}", Split()) == "test"] == [6, 14]


def test_shares_are_as_asked_for() -> None:
    split = Split(validation=0.15, test=0.05, salt="s")
    sides = [split_of(f"name {n}", split) for n in range(10_000)]
    for side, share in (("train", 0.8), ("validation", 0.15), ("test", 0.05)):
        sigma = (10_000 * share * (1 - share)) ** 0.5
        assert abs(sides.count(side) - 10_000 * share) < 3 * sigma


def test_another_salt_is_another_split() -> None:
    names = [f"name {n}" for n in range(1000)]
    one, other = ([split_of(name, Split(salt=salt)) for name in names] for salt in ("a", "b"))
    assert one != other
