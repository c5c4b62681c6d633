"""Losses by step: the mean of several models, and their lines in one SVG. Pure."""

from collections.abc import Mapping, Sequence
from html import escape

from vila_ops.report.drawing import axis, polyline

Step = tuple[int, float]
"""Step and loss."""
WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40
"""Margins, for the numbers of the axes."""
LINE_HEIGHT = 20
"""Of a name in the legend."""
COLOURS = (
    ("--model", "#1d4fd8"),
    ("--control", "#b4500b"),
    ("--good", "#0f6b3a"),
    ("--bad", "#a3231c"),
    ("--chance", "#6b7280"),
)
"""Colours by their variable in a page, and their value outside of it; further lines begin again, dashed."""


def mean_of(curves: Sequence[Sequence[Step]]) -> list[Step]:
    """The mean of several curves at the steps that all of them have."""
    by_step = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(one) for one in by_step)))
    return [(step, sum(one[step] for one in by_step) / len(by_step)) for step in common]


def draw(lines: Mapping[str, Sequence[Step]], *, legend: bool = False) -> str | None:
    """An SVG with a line of (step, loss) for each name; None without points. `legend`: with the names below."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return None
    scale = axis([loss for _, loss in points], ticks=5, lowest=HEIGHT - BOTTOM, highest=TOP)
    steps = axis([0, *(step for step, _ in points)], ticks=8, lowest=LEFT, highest=WIDTH - RIGHT)
    drawn = [_tick(scale.at(tick), scale.label(tick)) for tick in scale.ticks]
    drawn += [_step(steps.at(tick), steps.label(tick)) for tick in steps.ticks]
    for number, (name, line) in enumerate(lines.items()):
        placed = polyline((steps.at(step), scale.at(loss)) for step, loss in line)
        drawn.append(
            f'<polyline points="{placed}" fill="none" stroke="{colour(number)}" stroke-width="2"{dash(number)}>'
            f"<title>{escape(name)}</title></polyline>"
        )
    height = HEIGHT
    if legend:
        drawn += [_name(number, name) for number, name in enumerate(lines)]
        height += LINE_HEIGHT * len(lines)
    told = "; ".join(f"{name} from {line[0][1]:.3f} to {line[-1][1]:.3f}" for name, line in lines.items() if line)
    style = 'font-family="system-ui, sans-serif" font-size="13" style="fill: var(--soft, #565e6c)"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="100%" role="img" {style} '
        f'aria-label="{escape(f"Loss by step: {told}.")}">\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def colour(number: int) -> str:
    """The colour of a line by its number."""
    variable, plain = COLOURS[number % len(COLOURS)]
    return f"var({variable}, {plain})"


def dash(number: int) -> str:
    """The dashes of a line by its number, where its colour is another line's too."""
    return ' stroke-dasharray="6 4"' if number >= len(COLOURS) else ""


def _name(number: int, name: str) -> str:
    """A line of the legend."""
    y = HEIGHT + LINE_HEIGHT * number + 4
    line = f'<line x1="{LEFT}" x2="{LEFT + 30}" y1="{y}" y2="{y}" stroke="{colour(number)}" stroke-width="2"'
    return f'{line}{dash(number)}/><text x="{LEFT + 40}" y="{y + 4}">{escape(name)}</text>'


def _tick(y: float, label: str) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" style="stroke: var(--grid, #dde1e8)"/>'
    return f'{line}<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{label}</text>'


def _step(x: float, label: str) -> str:
    return f'<text x="{x}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{label}</text>'
