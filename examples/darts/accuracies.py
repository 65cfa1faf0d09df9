"""A table of test accuracies: a row for each network of a space, a column for each seed."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bilevel_flax.bench.folder import write_csv

Genotype = tuple[str, ...]


class Accuracies(NamedTuple):
    """What the rows of a table are.

    Attributes:
        space: its name, for errors.
        path: the CSV file that is committed.
        genotypes: the network of each row.
        columns: the first columns.
        cells: what stands in them, row by row.
        seeds: trainings of each network.
        same: the row of the network that a row is another name of; None: all of them differ.
    """

    space: str
    path: Path
    genotypes: Sequence[Genotype]
    columns: tuple[str, ...]
    cells: Sequence[tuple[str, ...]]
    seeds: int
    same: Sequence[int] | None = None

    @property
    def header(self) -> tuple[str, ...]:
        """The names of all columns."""
        return (*self.columns, *(f"accuracy_seed_{seed}" for seed in range(self.seeds)))

    def read(self, path: Path | None = None) -> np.ndarray:
        """Test accuracies in [0, 1], float64 [networks, seeds]; NaN: not trained.

        Raises:
            ValueError: the file is no such table.
        """
        path = path or self.path
        if not path.exists():
            return np.full((len(self.cells), self.seeds), np.nan)
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        width = len(self.columns)
        if tuple(header) != self.header or [tuple(row[:width]) for row in rows] != [*self.cells]:
            raise ValueError(
                f"{path} has {len(rows)} rows, columns {', '.join(header) or 'none'}: it is no "
                f"table of {self.space}; delete it to train anew"
            )
        return np.array([[float(value or "nan") for value in row[width:]] for row in rows])

    def write(self, accuracies: np.ndarray, path: Path | None = None) -> None:
        """Replaces the table in one step."""
        values = [
            ["" if np.isnan(value) else f"{value:.4f}" for value in row] for row in accuracies
        ]
        rows = [(*cells, *row) for cells, row in zip(self.cells, values, strict=True)]
        write_csv(path or self.path, self.header, rows)

    def complete(
        self,
        trainer: Callable[[Genotype, int], float],
        path: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> np.ndarray:
        """Trains what the table lacks, all networks with seed 0 first; returns the table.

        Args:
            trainer: `trainer(genotype, seed) -> test accuracy`.
            path: of the table, which is written after each training.
            say: is handed a line after each training.
        """
        table = self.read(path)
        same = np.arange(len(table)) if self.same is None else np.asarray(self.same)
        missing = [(seed, row) for seed, row in np.argwhere(np.isnan(table.T)) if same[row] == row]
        for count, (seed, row) in enumerate(missing, 1):
            genotype = self.genotypes[row]
            table[same == row, seed] = trainer(genotype, int(seed))
            self.write(table, path)
            accuracy = table[row, seed]
            say(f"[{count}/{len(missing)}] seed {seed}, {' '.join(genotype)}: {accuracy:.4f}")
        return table
