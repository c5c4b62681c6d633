"""Tables and numbers for a terminal."""

Row = tuple[str, ...]
WIDTH = 80
"""Columns of a terminal."""


def table(rows: list[Row]) -> list[str]:
    """The lines of a table; columns are as wide as their widest cell.

    Columns that would exceed the terminal follow in further tables, each of which begins with the first column.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for columns in _blocks(widths):
        lines += [""] if lines else []
        lines += ["  ".join(row[column].ljust(widths[column]) for column in columns).rstrip() for row in rows]
    return lines


def _blocks(widths: list[int]) -> list[list[int]]:
    """The columns of each table."""
    blocks = [[0]]
    for column in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[one] + 2 for one in blocks[-1]) + widths[column] > WIDTH:
            blocks.append([0])
        blocks[-1].append(column)
    return blocks


def short(count: float, *, digits: int = 3) -> str:
    """1,234,567 as `1.23 M`; below a thousand the number and a space, so that a unit may follow."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{digits}g} {unit}"
    return f"{count:.0f} "
