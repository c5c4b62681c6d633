import itertools
import re
from typing import Any
from xml.etree import ElementTree as Xml

import pytest

from vila_ops.report.layers import BOTTOM, HEIGHT, LEFT, LINE_HEIGHT, RIGHT, TOP, WIDTH, draw

SVG = "{http://www.w3.org/2000/svg}"


def points(model: str, role: str, values: list[float]) -> list[dict[str, Any]]:
    """A line with an interval of 0.02."""
    return [
        {"model": model, "role": role, "layer": layer, "value": v, "low": v - 0.01, "high": v + 0.01}
        for layer, v in enumerate(values)
    ]


def parsed(shown: list[dict[str, Any]]) -> Xml.Element:
    """The drawing as XML, which a browser wants of a file of its own."""
    drawn = draw(shown)
    assert drawn is not None
    return Xml.fromstring(drawn)


def lines(svg: Xml.Element) -> list[list[tuple[float, float]]]:
    """The drawn lines as points."""
    drawn = [line.attrib["points"].split() for line in svg.iter(f"{SVG}polyline")]
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line)] for line in drawn]


def test_each_line_has_a_point_for_each_layer_and_higher_is_further_up() -> None:
    svg = parsed(points("base", "model", [0.1, 0.2, 0.4]) + points("sft", "model", [0.1, 0.3, 0.9]))
    base, sft = lines(svg)
    assert [x for x, _ in base] == [x for x, _ in sft] == [LEFT, (WIDTH + LEFT - RIGHT) / 2, WIDTH - RIGHT]
    assert base[0][1] > base[1][1] > base[2][1] > sft[2][1]
    assert all(TOP <= y <= HEIGHT - BOTTOM for line in (base, sft) for _, y in line)
    # 0.1 to 0.2 and 0.2 to 0.4 on one scale
    assert (base[1][1] - base[2][1]) / (base[0][1] - base[1][1]) == pytest.approx((0.4 - 0.2) / (0.2 - 0.1), rel=1e-3)


def test_names_stand_beside_their_lines_and_never_on_each_other() -> None:
    models = ["base", "align", "pretrain", "sft"]
    svg = parsed([p for m in models for role in ("model", "control") for p in points(m, role, [0.1, 0.5])])
    names = [text for text in svg.iter(f"{SVG}text") if text.text and re.match("base|align|pretrain|sft", text.text)]
    assert len(names) == 8
    heights = sorted(float(name.attrib["y"]) for name in names)
    assert all(b - a >= LINE_HEIGHT - 0.11 for a, b in itertools.pairwise(heights))
    assert heights[-1] <= HEIGHT - BOTTOM + 4.1
    assert len({name.attrib["fill"] for name in names}) == 4


def test_it_can_be_read_without_seeing_it_and_hostile_names_are_only_text() -> None:
    svg = parsed(points("<script>\"'&", "model", [0.125, 0.5]))
    assert svg.attrib["aria-label"] == "Similarity by layer: <script>\"'& from 0.125 to 0.500."
    assert not list(svg.iter(f"{SVG}script"))


def test_layers_of_a_deep_model_carry_about_ten_numbers() -> None:
    svg = parsed(points("sft", "model", [0.1] * 81))
    numbers = [int(t.text) for t in svg.iter(f"{SVG}text") if t.attrib.get("text-anchor") == "middle" and t.text]
    assert numbers[0] == 0
    assert numbers[-1] == 80
    assert 8 <= len(numbers) <= 12


def test_nothing_measured_is_nothing_drawn() -> None:
    assert draw([]) is None
