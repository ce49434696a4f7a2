"""Pages whose tables are written from records: each table stands between two markers."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Put each table between ``<!-- its name -->`` and the next ``<!-- end -->`` of a page.

    Raises:
        ValueError: The page has no such place, or more than one.
    """
    text = page.read_text()
    for name, table in tables.items():
        found = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        text, count = re.subn(found, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{page} has {count} places for the table {name!r}; it takes one.")
    page.write_text(text)
