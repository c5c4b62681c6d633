import pytest

from vila_ops.data.sources.object_names import object_name, singular


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A red apple.", "apple"),
        ("green apple", "apple"),
        ("A pair of closed scissors.", "scissors"),
        ("A bunch of grapes.", "grape"),
        ("A castle in ruins.", "castle"),
        ("A peacock (a male peafowl).", "peacock"),
        ("Mercury—the planet closest to the Sun.", "mercury"),
        ("A hibiscus flower.", "hibiscus"),
        ("A yellow flower.", "flower"),
        ("A ripe, red tomato.", "tomato"),
        ("A red and white anemone flower.", "anemone"),
        ("Hammer and wrench.", "hammer"),
        ("A “Stop” sign. Stop here, then go when it’s your turn.", "sign"),
        ("A Jack-o’-lantern.", "jack-o-lantern"),
        ("dog face", "dog"),
        ("hot dog", "hot-dog"),
        ("A fire truck.", "fire-engine"),
        ("A knight’s helmet.", "helmet"),
        ("A stethoscope lets your doctor listen to your heart.", "stethoscope"),
        ("The baby of a gnu.", "gnu"),
        ("We remember those who have died.", "we remember those who have died"),
        ("Because a brain is a terrible thing to waste.", "because a brain is a terrible thing to waste"),
        ("It's a cep, or they are two ceps.", "it's a cep, or they are two ceps"),
        ("…", "…"),
    ],
)
def test_a_caption_is_named_by_its_head_noun(caption: str, expected: str):
    assert object_name(caption) == expected


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("cherries", "cherry"),
        ("pies", "pie"),
        ("boxes", "box"),
        ("glasses", "glass"),
        ("houses", "house"),
        ("tomatoes", "tomato"),
        ("shoes", "shoe"),
        ("leaves", "leaf"),
        ("octopus", "octopus"),
        ("compass", "compass"),
        ("iris", "iris"),
        ("bus", "bus"),
        ("owls", "owl"),
        ("pants", "pants"),
    ],
)
def test_nouns_are_made_singular(noun: str, expected: str):
    assert singular(noun) == expected
