"""Tables and numbers for a terminal."""

Row = tuple[str, ...]


def table(rows: list[Row]) -> list[str]:
    """The lines of a table; columns are as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def short(count: float, *, digits: int = 3) -> str:
    """1,234,567 as `1.23 M`; below a thousand the number and a space, so that a unit may follow."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{digits}g} {unit}"
    return f"{count:.0f} "
