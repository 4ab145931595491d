"""Tables on a terminal: with rich when a person looks, else as aligned lines."""

from collections.abc import Sequence

from trm_fast.train.display import is_terminal
from trm_fast.train.reports.tables import Table


def show(table: Table) -> None:
    """Prints a table, unless it is empty.

    Raises:
        ModuleNotFoundError: the output is a terminal, and rich is not installed.
    """
    rows = [tuple(map(printable, row)) for row in table.rows]
    if not rows:
        return
    if is_terminal():
        _show_rich(table, rows)
        return
    print(f"\n{printable(table.title)}")
    for line in aligned([table.header, *rows] if table.header else rows, table.numeric):
        print(f"  {line}")


def _show_rich(table: Table, rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=Text(printable(table.title)), show_header=bool(table.header))
    shown.title_justify = "left"
    for place in range(len(rows[0])):
        name = table.header[place] if table.header else ""
        right = table.numeric and place > 0
        shown.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    Console().print(shown)


def aligned(rows: Sequence[Sequence[str]], numeric: bool = False) -> list[str]:
    """Returns lines with columns of one width; numbers stand to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if numeric and place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def printable(text: str) -> str:
    """Returns a text without control characters, which could steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
