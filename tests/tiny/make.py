"""Make the fixtures of the `tiny` recipe: four small folders of records and the tokenizer trained on their texts.

From the root of the repository, with the four packages named in LICENSES.md unpacked (npm: `tar xzf`, Debian:
`dpkg-deb -x`):

    python tests/tiny/make.py --fluent DIR --emojibase DIR --wordnet DIR --gnome DIR

The same packages give the same bytes.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
CHAT_TEMPLATE = HERE.parents[1] / "vila_ops/templates/chatml.jinja"

FLUENT = "npm @lobehub/fluent-emoji-3d 1.1.0"
EMOJIBASE = "npm emojibase-data 17.0.0"
WORDNET = "debian wordnet-base 1:3.0-37"
GNOME = "debian gnome-user-docs 43.0-2"

IMAGE_SIDE = 56
IMAGE_COLOURS = 48
VOCABULARY = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
"""In the order of their ids, the first three as in SmolLM2."""

# fmt: off
IMAGED = {
    "dog": 1, "cat": 1, "horse": 1, "elephant": 1, "lion": 1, "polar bear": 1,
    "penguin": 1, "owl": 1, "duck": 1, "swan": 1, "flamingo": 1, "parrot": 1,
    "banana": 2, "lemon": 1, "pineapple": 2, "strawberry": 1, "pear": 1, "kiwi fruit": 1,
    "carrot": 3, "broccoli": 2, "potato": 1, "eggplant": 1, "onion": 3, "bell pepper": 2,
    "bus": 1, "bicycle": 1, "tractor": 1, "ambulance": 1, "taxi": 1, "fire engine": 1,
    "guitar": 1, "violin": 1, "trumpet": 1, "drum": 1, "accordion": 1, "banjo": 1,
    "hammer": 2, "axe": 1, "wrench": 3, "screwdriver": 1, "ladder": 1, "magnet": 1,
    "scarf": 1, "crown": 4, "top hat": 1, "glasses": 1, "backpack": 1, "running shoe": 1,
}
"""The emoji, by CLDR name, and the WordNet sense of that name that the image shows; six of each category in turn."""

DEFINED = {
    "whale": 2, "frog": 1, "spider": 1, "tiger": 2, "eagle": 1, "bee": 1,
    "chair": 1, "bridge": 1, "clock": 1, "lamp": 1, "telescope": 1, "boat": 1,
    "heart": 2, "hand": 1, "lung": 1, "skull": 1, "bone": 1, "knee": 1,
    "bread": 1, "cheese": 1, "honey": 1, "soup": 1, "butter": 1, "rice": 1,
    "mountain": 1, "river": 1, "island": 1, "star": 1, "lake": 1, "cave": 1,
    "teacher": 1, "baker": 1, "sailor": 1, "poet": 1, "farmer": 1, "judge": 1,
    "fern": 1, "moss": 1, "rose": 1, "daisy": 1, "tulip": 1, "bamboo": 2,
    "rain": 1, "wind": 1, "fog": 1, "snow": 1, "breeze": 1, "storm": 1,
}
"""Nouns without an image and the WordNet sense to define."""

HELP_PAGES = (
    "a11y-contrast", "a11y-font-size", "a11y-mag", "a11y-slowkeys", "accounts-remove", "color-calibrate-screen",
    "color-howtoimport", "display-blank", "files-delete", "files-removedrive", "files-rename", "gnome-version",
    "keyboard-osk", "look-display-fuzzy", "mouse-doubleclick", "mouse-lefthanded", "net-default-browser",
    "power-autobrightness", "power-percentage", "power-whydim", "printing-differentsize", "printing-select",
    "shell-windows-switching", "sound-usespeakers",
)
"""Pages of GNOME's help that are one short list of steps."""

NOUN_FILES = {
    5: "noun.animal", 6: "noun.artifact", 8: "noun.body", 13: "noun.food", 17: "noun.object", 18: "noun.person",
    19: "noun.phenomenon", 20: "noun.plant",
}
"""WordNet's numbers of its lexicographer files (lexnames(5WN)), as far as our nouns need them."""
# fmt: on

MALLARD = "{http://projectmallard.org/1.0/}"

Json = dict[str, Any]


@dataclass(frozen=True)
class Emoji:
    """One image and what CLDR says of it."""

    name: str
    category: str
    image: Path

    @property
    def file(self) -> str:
        """Name of the image in our folders."""
        return self.name.replace(" ", "-") + ".png"


@dataclass(frozen=True)
class Sense:
    """One meaning of a noun in WordNet."""

    definition: str
    category: str
    hypernym: str
    offset: int


class WordNet:
    """WordNet's noun files."""

    def __init__(self, root: Path) -> None:
        """Read the index by noun, and the data as bytes because the index points into it by byte."""
        folder = root / "usr/share/wordnet"
        self._data = (folder / "data.noun").read_bytes()
        lines = (folder / "index.noun").read_text(encoding="utf-8").splitlines()
        self._index = {line.split(" ", 1)[0]: line.split() for line in lines if not line.startswith(" ")}

    def sense(self, noun: str, number: int) -> Sense:
        """The sense of this number, counted from 1 as WordNet does."""
        entry = self._index[noun.replace(" ", "_")]
        offset = int(entry[-int(entry[2]) :][number - 1])
        fields, gloss = self._line(offset)
        pointers = fields[4 + 2 * int(fields[3], 16) :]
        hypernym = int(pointers[pointers.index("@") + 1])
        return Sense(
            definition=gloss.split('; "')[0].strip(),
            category=NOUN_FILES[int(fields[1])],
            hypernym=self._line(hypernym)[0][4].replace("_", " "),
            offset=offset,
        )

    def _line(self, offset: int) -> tuple[list[str], str]:
        """The fields before the bar and the gloss behind it, of the synset at this byte."""
        line = self._data[offset : self._data.index(b"\n", offset)].decode()
        fields, gloss = line.split(" | ")
        return fields.split(), gloss


def sentence(text: str) -> str:
    """Upper-case the first letter and nothing else."""
    return text[0].upper() + text[1:]


def listing(names: list[str]) -> str:
    """a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def read_emoji(fluent: Path, emojibase: Path) -> list[Emoji]:
    """The imaged emoji, in the order of `IMAGED`."""
    data = json.loads((emojibase / "package/en/data.json").read_text(encoding="utf-8"))
    groups = json.loads((emojibase / "package/meta/groups.json").read_text(encoding="utf-8"))
    by_name = {entry["label"]: entry for entry in data}
    found = []
    for name in IMAGED:
        entry = by_name[name]
        category = groups["groups"][str(entry["group"])] + "/" + groups["subgroups"][str(entry["subgroup"])]
        image = fluent / "package/assets" / (entry["hexcode"].lower() + ".webp")
        found.append(Emoji(name=name, category=category, image=image))
    return found


def write_image(emoji: Emoji, folder: Path) -> None:
    """A small RGBA PNG of few colours, its background transparent."""
    with Image.open(emoji.image) as image:
        side = (IMAGE_SIDE, IMAGE_SIDE)
        small = image.convert("RGBA").resize(side, Image.Resampling.LANCZOS)
    few_colours = small.quantize(IMAGE_COLOURS, Image.Quantize.FASTOCTREE).convert("RGBA")
    few_colours.save(folder / emoji.file, optimize=True)


def turn(role: str, *parts: str | Emoji) -> Json:
    """One turn of the record layout; an emoji stands for its image."""
    return {"role": role, "parts": [{"text": p} if isinstance(p, str) else {"image": p.file} for p in parts]}


def fluent_provenance(emoji: Emoji) -> str:
    """Where an image and its name come from."""
    return f"{FLUENT}: assets/{emoji.image.name}; {EMOJIBASE}: en/data.json"


def wordnet_provenance(senses: Iterable[Sense]) -> str:
    """Which synsets a text comes from."""
    return f"{WORDNET}: usr/share/wordnet/data.noun at " + ", ".join(f"{sense.offset:08d}" for sense in senses)


def pair(emoji: Emoji) -> Json:
    """An image and its name."""
    return {
        "id": emoji.name.replace(" ", "-"),
        "object": emoji.name,
        "category": emoji.category,
        "licence": "MIT",
        "provenance": fluent_provenance(emoji),
        "turns": [turn("document", emoji, sentence(emoji.name) + ".")],
    }


def paragraph(emoji: Emoji, sense: Sense) -> str:
    """What WordNet says of an imaged object."""
    return f"{sentence(emoji.name)}: {sense.definition}. It is a kind of {sense.hypernym}."


def document(name: str, shown: list[Emoji], senses: list[Sense], image_first: bool) -> Json:
    """A heading, then a paragraph and an image of each object, all images on the same side of their paragraphs."""
    heading = sentence(listing([emoji.name for emoji in shown]))
    parts: list[str | Emoji] = []
    for emoji, sense in zip(shown, senses, strict=True):
        text = paragraph(emoji, sense)
        parts += [emoji, text] if image_first else [text, emoji]
    parts = [heading, *parts] if image_first else [f"{heading}\n{parts[0]}", *parts[1:]]
    return {
        "id": name,
        "object": shown[0].name,
        "category": shown[0].category,
        "licence": "MIT AND WordNet3.0",
        "provenance": "; ".join([*(fluent_provenance(emoji) for emoji in shown), wordnet_provenance(senses)]),
        "turns": [turn("document", *parts)],
    }


def documents(emojis: list[Emoji], wordnet: WordNet) -> Iterator[Json]:
    """Three documents of each category: of three, two and two of its six objects."""
    for category, group in groupby(emojis, key=lambda emoji: emoji.category):
        members = list(group)
        for number, shown in enumerate([members[0:3], members[2:4], members[4:6]]):
            senses = [wordnet.sense(emoji.name, IMAGED[emoji.name]) for emoji in shown]
            name = f"{category.split('/')[1]}-{number}"
            yield document(name, shown, senses, image_first=number == 1)


def definition(noun: str, sense: Sense) -> Json:
    """A noun and its meaning as text alone."""
    return {
        "id": noun,
        "object": noun,
        "category": sense.category,
        "licence": "WordNet3.0",
        "provenance": wordnet_provenance([sense]),
        "turns": [turn("document", f"{noun}: {sense.definition}")],
    }


def raw_text(element: ElementTree.Element) -> str:
    """The text of a Mallard element, menu paths and key combinations with their separators."""
    separator = {f"{MALLARD}guiseq": " > ", f"{MALLARD}keyseq": "+"}.get(element.tag)
    if separator:
        return separator.join(raw_text(child) for child in element)
    return (element.text or "") + "".join(raw_text(child) + (child.tail or "") for child in element)


def lines(root: ElementTree.Element, path: str) -> list[str]:
    """The text of each Mallard element at this path, on one line each."""
    qualified = "/".join(MALLARD + step for step in path.split("/"))
    return [" ".join(raw_text(element).split()) for element in root.findall(qualified)]


def question(title: str) -> str:
    """What a user would ask to be shown the page of this title."""
    if title.endswith("?"):
        return title
    return f"How do I {title[0].lower()}{title[1:].replace('your ', 'my ')}?"


def instruction(page: str, gnome: Path) -> Json:
    """A page of GNOME's help as a question and its numbered steps."""
    path = f"usr/share/help/C/gnome-help/{page}.page"
    root = ElementTree.parse(gnome / path).getroot()
    (title,) = lines(root, "title")
    steps = [" ".join(lines(item, "p")) for item in root.findall(f"{MALLARD}steps/{MALLARD}item")]
    guides = [link.attrib["xref"] for link in root.findall(f"{MALLARD}info/{MALLARD}link[@type='guide']")]
    authors = listing(lines(root, "info/credit/name"))
    return {
        "id": page,
        "object": title.lower(),
        "category": guides[0].split("#")[0],
        "licence": "CC-BY-SA-3.0",
        "provenance": f"{GNOME}: {path}, by {authors}; shortened",
        "turns": [
            turn("user", question(title)),
            turn("assistant", "\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))),
        ],
    }


def write_records(folder: Path, records: Iterable[Json], images: Iterable[Emoji] = ()) -> None:
    """Replace a folder by these records and the images they name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "records.jsonl").write_text(text, encoding="utf-8")
    for emoji in images:
        write_image(emoji, folder)


def texts(records: Iterable[Json]) -> list[str]:
    """Every text of these records."""
    return [part["text"] for record in records for turn in record["turns"] for part in turn["parts"] if "text" in part]


def write_tokenizer(folder: Path, corpus: list[str]) -> None:
    """Train a byte-level BPE, which can encode any text, and replace a folder by it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    end_of_text, start, end, image = SPECIAL_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        extra_special_tokens={"image_token": image, "end_of_text_token": end_of_text},
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )
    shutil.rmtree(folder, ignore_errors=True)
    fast.save_pretrained(folder)


def make(fluent: Path, emojibase: Path, wordnet_root: Path, gnome: Path, out: Path) -> None:
    """Write every fixture under `out`."""
    wordnet = WordNet(wordnet_root)
    emojis = read_emoji(fluent, emojibase)
    pairs = [pair(emoji) for emoji in emojis]
    interleaved = list(documents(emojis, wordnet))
    instructions = [instruction(page, gnome) for page in HELP_PAGES]
    definitions = [definition(noun, wordnet.sense(noun, number)) for noun, number in DEFINED.items()]
    write_records(out / "pairs", pairs, images=emojis)
    write_records(out / "documents", interleaved, images=emojis)
    write_records(out / "instructions", instructions)
    write_records(out / "definitions", definitions)
    write_tokenizer(out / "tokenizer", texts([*pairs, *interleaved, *instructions, *definitions]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the fixtures of the tiny recipe from four unpacked packages.")
    parser.add_argument("--fluent", type=Path, required=True, help=FLUENT)
    parser.add_argument("--emojibase", type=Path, required=True, help=EMOJIBASE)
    parser.add_argument("--wordnet", type=Path, required=True, help=WORDNET)
    parser.add_argument("--gnome", type=Path, required=True, help=GNOME)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    make(given.fluent, given.emojibase, given.wordnet, given.gnome, given.out)


if __name__ == "__main__":
    main()
