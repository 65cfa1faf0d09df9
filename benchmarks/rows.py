"""What a benchmark found: a line as soon as it is there; with `--markdown`, a table at the end."""

from __future__ import annotations

import argparse
from typing import Any

from bilevel_flax.bench import markdown


class Rows:
    """Takes a dict a row, all with the same keys.

    Args:
        as_table: print one Markdown table at the end, under its command, machine and versions.
    """

    def __init__(self, as_table: bool):
        self._as_table, self._rows = as_table, []

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._as_table and self._rows and kind is None:
            print(f"{markdown.caption()}\n")
            print(markdown.table(list(self._rows[0]), [list(row.values()) for row in self._rows]))

    def add(self, row: dict[str, Any]) -> None:
        """One more."""
        self._rows.append(row)
        if not self._as_table:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option of every command that prints rows."""
    parser.add_argument("--markdown", action="store_true", help="a table for the results' page")
