"""What a benchmark found: a line as soon as it is there; with `--markdown`, tables at the end."""

from __future__ import annotations

import argparse
from typing import Any

from bilevel_flax.bench import markdown


class Rows:
    """Takes a dict a row; the rows of one title are a table.

    Args:
        as_table: print Markdown tables at the end, under their command, machine and versions.
    """

    def __init__(self, as_table: bool):
        self._as_table = as_table
        self._tables: dict[str, list[dict[str, Any]]] = {}

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if not self._as_table or not self._tables or kind is not None:
            return
        print(markdown.caption())
        for title, rows in self._tables.items():
            header = list(dict.fromkeys(name for row in rows for name in row))
            body = [[row.get(name, "") for name in header] for row in rows]
            print(f"\n{title}\n" if title else "")
            print(markdown.table(header, body))

    def add(self, row: dict[str, Any], title: str = "") -> None:
        """One more."""
        if title and title not in self._tables and not self._as_table:
            print(title)
        self._tables.setdefault(title, []).append(row)
        if not self._as_table:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option of every command that prints rows."""
    parser.add_argument("--markdown", action="store_true", help="a table for the results' page")
