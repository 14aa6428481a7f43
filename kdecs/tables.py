"""Tables of figures and lengths of time, as every command prints them on a terminal."""

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from kdecs.errors import CONTROL


class _Terminal(Console):
    """A console that drops the control characters of text: what a file holds must not steer it."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable; its styles and line ends stay."""
        for text, style, control in super().render(renderable, options):
            # Not as escapes, because Rich has measured them with no width.
            shown = text if control else "\n".join(CONTROL.sub("", line) for line in text.split("\n"))
            yield Segment(shown, style, control)


def terminal(**options: Any) -> Console:
    """Rich's console, on which names of files, teachers and trials look as they are.

    By default `[x]` in a name would be markup, which disappears or ends the command, and `:x:` an emoji.
    """
    return _Terminal(markup=False, emoji=False, **options)


def figures_table(title: str, first: str, *columns: str, tight: bool = False) -> Table:
    """A table with a left column of names and right-aligned columns of figures; headings break between words only.

    A `tight` one has no margins and never wraps a figure: for many columns in 80 characters.
    """
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=tight, pad_edge=not tight)
    table.add_column(first, no_wrap=True)
    for name in columns:
        # Without the minimum, Rich breaks a heading inside a word before it narrows another column.
        table.add_column(name, justify="right", no_wrap=tight, min_width=max(map(len, name.split())))
    return table


def markdown_table(table: Table) -> str:
    """A table as Markdown, without its title."""
    heads = [str(column.header) for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [heads, ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def duration(seconds: float) -> str:
    """A length of time such as 12s, 1m40s or 2h05m."""
    # Rounded before it is divided: 119.7 seconds are 2m00s, not 1m60s.
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"
