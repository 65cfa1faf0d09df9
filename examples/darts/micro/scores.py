"""What a search's genotype is worth, from the exhaustive table: regret, rank, collapse.

The accuracy of a network is its mean over the table's seeds. Every one of the 625 names counts, so
that the rank says how good a name drawn at random would be.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from examples.darts.micro import table as micro_table
from examples.darts.micro.space import Genotype, distinct, paths

CONVOLUTIONS = ("nor_conv_1x1", "nor_conv_3x3")


class Score(NamedTuple):
    """A genotype's worth.

    Attributes:
        accuracy: its mean test accuracy, in [0, 1].
        regret: the best mean accuracy in the table minus this one.
        rank_percentile: share of the other names that are strictly better, in [0, 1].
        collapsed: see `collapsed`.
    """

    accuracy: float
    regret: float
    rank_percentile: float
    collapsed: bool


def collapsed(genotype: Genotype) -> bool:
    """Whether at most one of the four edges carries a convolution that has an effect.

    The rest is then `skip_connect`, `avg_pool_3x3`, `none`, or dead behind a `none`: an
    architecture that hardly computes anything, as in DARTS's known failure.
    """
    alive = [name for path in paths(genotype) if path is not None for name in path]
    return sum(name in CONVOLUTIONS for name in alive) <= 1


def check_complete(table: np.ndarray) -> None:
    """Raises while networks wait for their training.

    Raises:
        ValueError: says how many, and the command that trains them.
    """
    if np.isnan(table).any():
        raise ValueError(
            f"the table of the micro-space lacks {int(np.isnan(table).sum())} of {table.size} "
            "accuracies: finish it with `python -m examples.darts.micro.table --manual-dir DIR`"
        )


def score(genotype: Genotype, table: np.ndarray) -> Score:
    """Regret and rank by the table.

    Args:
        genotype: one of the 625.
        table: accuracies float64 [625, seeds] (`micro_table.read`).

    Raises:
        ValueError: the table is not complete.
    """
    check_complete(table)
    means = table.mean(axis=1)
    accuracy = means[micro_table.number(genotype)]
    better = int(np.sum(means > accuracy + 1e-12))
    return Score(
        float(accuracy),
        float(means.max() - accuracy),
        better / (len(means) - 1),
        collapsed(genotype),
    )


def rank_ceiling(table: np.ndarray) -> float:
    """The mean Spearman correlation between the table's seeds, over the networks that differ.

    No method can be expected to predict one seed's ranking better than another seed does.
    """
    rows = [micro_table.number(genotype) for genotype in distinct()]
    ranks = stats.rankdata(table[rows], axis=0)
    pairs = [
        np.corrcoef(ranks[:, one], ranks[:, other])[0, 1]
        for one in range(ranks.shape[1])
        for other in range(one)
    ]
    return float(np.mean(pairs))
