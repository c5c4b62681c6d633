import subprocess
import sys

import pytest

from vila_ops.data.records import Image, Record, Turn
from vila_ops.data.text.questions import DESCRIBE, ObjectNames, questions

NAMES = ObjectNames({"animals": ("cat", "dog", "owl"), "food": ("kiwi", "pear")})
IMAGE = Image(b"png")


def record(number: int, name: str = "dog", *parts: str | Image) -> Record:
    said = (Turn("document", parts or (IMAGE, "Dog.")),)
    return Record(id=str(number), object=name, turns=said, category="animals", licence="l", provenance="p")


def asked(number: int, seed: int = 0) -> tuple[str, str]:
    _, yes_no = questions(record(number), NAMES, seed=seed)
    (image, question), (answer,) = (turn.parts for turn in yes_no.turns)
    assert image == IMAGE
    return str(question), str(answer)


def test_two_conversations_of_one_image() -> None:
    describe, yes_no = questions(record(1), NAMES, seed=0)
    assert (describe.id, yes_no.id) == ("1#describe", "1#yes_no")
    assert describe.turns[0].role == yes_no.turns[0].role == "user"
    assert describe.turns[0].parts[0] == IMAGE
    assert describe.turns[0].parts[1] in DESCRIBE
    assert describe.turns[1] == Turn("assistant", ("Dog.",))


def test_answers_are_true_and_half_of_them_yes() -> None:
    found = [asked(number) for number in range(2000)]
    for question, answer in found:
        assert question.endswith("in the image? Answer yes or no.")
        assert answer == ("Yes." if "Is there a dog in" in question else "No.")
    yes = sum(answer == "Yes." for _, answer in found)
    assert abs(yes - 1000) < 3 * (2000 * 0.25) ** 0.5
    wrong = [question.split()[3] for question, answer in found if answer == "No."]
    assert set(wrong) == {"cat", "owl", "kiwi", "pear"}
    near = sum(name in ("cat", "owl") for name in wrong)  # half of its kind, and half of the other half by chance
    assert abs(near / len(wrong) - 0.75) < 0.06


def test_draws_depend_on_seed_and_id_alone() -> None:
    assert [asked(n) for n in range(50)] == [asked(n) for n in range(50)]
    assert [asked(n) for n in range(50)] != [asked(n, seed=1) for n in range(50)]
    code = (
        "from vila_ops.data.text.questions import *; from vila_ops.data.records import *;"
        "n = ObjectNames({'animals': ('cat', 'dog', 'owl'), 'food': ('kiwi', 'pear')});"
        "r = lambda i: Record(str(i), 'dog', (Turn('document', (Image(b'png'), 'Dog.')),), 'animals', 'l', 'p');"
        "import sys; sys.stdout.write(repr([questions(r(i), n, seed=0)[1].turns[0].parts[1] for i in range(20)]))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0].decode() == told[1].decode() == repr([asked(n)[0] for n in range(20)])


def test_what_cannot_be_asked_about_is_named() -> None:
    with pytest.raises(ValueError, match=r"record '7' is not one image with a caption"):
        questions(record(7, "dog", "Only words."), NAMES, seed=0)
    with pytest.raises(ValueError, match=r"record '7' is not one image"):
        questions(record(7, "dog", IMAGE), NAMES, seed=0)
    alone = ObjectNames({"animals": ("dog",)})
    denied = next(number for number in range(20) if asked(number)[1] == "No.")
    with pytest.raises(ValueError, match="no other object to ask about"):
        questions(record(denied), alone, seed=0)
