"""Similarity of images and captions by layer as one SVG, for a file of its own or inside the report. Pure."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

from vila_ops.report.drawing import Point, axis, polyline

Json = dict[str, Any]

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 52, 150, 14, 46
"""Margins, for the numbers of the axis, the names of the lines and the numbers of the layers."""
LINE_HEIGHT = 17
COLOURS = (
    ("--bad", "#a3231c"),
    ("--chance", "#6b7280"),
    ("--control", "#b4500b"),
    ("--good", "#0f6b3a"),
    ("--model", "#1d4fd8"),
)
"""Colours by their variable in the report's page, and their value outside of it. The last model has the last colour."""


def draw(points: Sequence[Json]) -> str | None:
    """An SVG with a line for each model, dashed for shuffled images; None without points.

    A point is one of a report's `layers` with the name of its `model`. Points are in the order of the layers.
    """
    if not points:
        return None
    scale = axis([p[key] for p in points for key in ("low", "high")], ticks=5, lowest=HEIGHT - BOTTOM, highest=TOP)
    last = max(point["layer"] for point in points)
    models = list(dict.fromkeys(point["model"] for point in points))
    lines = {of: list(line) for of, line in groupby(points, key=lambda p: (p["model"], p["role"]))}

    def place(layer: int, value: float) -> Point:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * layer / max(1, last), 1), scale.at(value)

    drawn = [_grid(tick_y, scale.label(tick)) for tick in scale.ticks for tick_y in [scale.at(tick)]]
    drawn += [_layer_number(place(layer, scale.low)[0], layer) for layer in _numbered(last)]
    for (model, role), line in lines.items():
        band = [place(p["layer"], p["high"]) for p in line] + [place(p["layer"], p["low"]) for p in reversed(line)]
        middle = polyline(place(p["layer"], p["value"]) for p in line)
        dash = ' stroke-dasharray="5 4" stroke-width="1.4"' if role == "control" else ' stroke-width="2.4"'
        colour = _colour(models, model)
        drawn.append(f'<polygon points="{polyline(band)}" fill="{colour}" opacity="0.1"/>')
        drawn.append(f'<polyline points="{middle}" fill="none" stroke="{colour}"{dash}/>')
    ends = {of: place(line[-1]["layer"], line[-1]["value"])[1] for of, line in lines.items()}
    for (model, role), y in _apart(ends).items():
        name = escape(_name(model, role))
        drawn.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}" fill="{_colour(models, model)}">{name}</text>')
    label = escape(f"Similarity by layer: {'; '.join(_words(of, line) for of, line in lines.items())}.")
    caption = "layer of the language model (0: its input). Chamfer similarity, 95 % band; dashed: shuffled images"
    axis_name = f'<text x="{LEFT}" y="{HEIGHT - 6}">{caption}</text>'
    style = 'font-family="system-ui, sans-serif" font-size="13" style="fill: var(--soft, #565e6c)"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="100%" role="img" {style} '
        f'aria-label="{label}">\n' + "\n".join([*drawn, axis_name]) + "\n</svg>\n"
    )


def _words(of: tuple[str, str], line: list[Json]) -> str:
    return f"{_name(*of)} from {line[0]['value']:.3f} to {line[-1]['value']:.3f}"


def _name(model: str, role: str) -> str:
    return model if role == "model" else f"{model}, shuffled"


def _colour(models: list[str], model: str) -> str:
    """A model's colour, counted from the last model, so that the final model always has the same one."""
    variable, plain = COLOURS[max(0, len(COLOURS) - len(models) + models.index(model))]
    return f"var({variable}, {plain})"


def _grid(y: float, label: str) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" style="stroke: var(--grid, #dde1e8)"/>'
    return f'{line}<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>'


def _layer_number(x: float, layer: int) -> str:
    return f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{layer}</text>'


def _numbered(last: int) -> list[int]:
    """The layers that have a number on the axis: about ten, with the first and the last."""
    step = max(1, -(-last // 10))
    inner = [layer for layer in range(0, last, step) if last - layer >= step or layer == 0]
    return [*inner, last] if last else inner


def _apart(ends: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Heights of the names: at the ends of their lines, moved down where two would overlap and up at the bottom."""
    placed: dict[tuple[str, str], float] = {}
    lowest = -float(LINE_HEIGHT)
    for of, y in sorted(ends.items(), key=lambda item: item[1]):
        lowest = placed[of] = max(y, lowest + LINE_HEIGHT)
    excess = max(0.0, lowest - (HEIGHT - BOTTOM))
    return {of: y - excess for of, y in placed.items()}
