"""What `clean` found: the network, and of each label whether it is wrong and what it should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bilevel_flax.base import PyTree

# A label is trained on if it is this sure, and called wrong if that is.
SURE = 0.9


class Suspicious(NamedTuple):
    """Training examples, the likeliest wrong first.

    Attributes:
        index: int [n], positions in the training set.
        probability: float32 [n], that the given label is wrong.
        suggested: int32 [n], the likeliest true label.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> found = bf.recipes.Suspicious(  # as `Cleaned.suspicious` gives it
        ...     np.array([7, 2]), probability=np.array([0.99, 0.3]), suggested=np.array([5, 1])
        ... )
        >>> found.index[found.probability > 0.5].tolist()
        [7]
    """

    index: np.ndarray
    probability: np.ndarray
    suggested: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """What `clean` found.

    Attributes:
        params: the network to hand over.
        model_state: its other variables (BatchNorm's statistics); {} where there are none.
        wrong_probability: float32 [n], that each given label is wrong.
        suggested_label: int32 [n], each example's likeliest label.
        confusion: float [K, K], P(given label | true label).
        resemblance: γ of `noise_model`: 0 for noise that ignores the example itself.
        plain_step_equivalents: what was spent, in plain trainings of the same number of steps.
        notes: sentences about the data that a user should know.

    Example:
        >>> import numpy as np, bilevel_flax as bf
        >>> cleaned = bf.recipes.Cleaned(  # as `clean` returns it
        ...     params={},
        ...     model_state={},
        ...     wrong_probability=np.array([0.1, 0.9], np.float32),
        ...     suggested_label=np.array([3, 5]),
        ...     confusion=np.eye(10),
        ...     resemblance=0.0,
        ...     plain_step_equivalents=3.2,
        ...     notes=(),
        ...     _predict=lambda inputs: inputs,
        ... )
        >>> cleaned.add_columns({"label": np.array([3, 1])})["suggested_label"].tolist()
        [3, 5]
    """

    params: PyTree
    model_state: PyTree
    wrong_probability: np.ndarray
    suggested_label: np.ndarray
    confusion: np.ndarray
    resemblance: float
    plain_step_equivalents: float
    notes: tuple[str, ...]
    _predict: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)

    @property
    def suspicious(self) -> Suspicious:
        """All examples in the order in which a person should look at them."""
        order = np.argsort(-self.wrong_probability, kind="stable")
        return Suspicious(order, self.wrong_probability[order], self.suggested_label[order])

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        """The network's class probabilities, float32 [m, K], of inputs [m, ...]."""
        return self._predict(np.asarray(inputs))

    def add_columns(self, dataset: Any) -> Any:
        """`dataset` with the columns `wrong_probability` and `suggested_label`.

        Args:
            dataset: the training set as a Hugging Face `Dataset`, or a dict of columns.

        Raises:
            TypeError: it is neither.
            ValueError: it has another length than the training set.
        """
        columns = {
            "wrong_probability": self.wrong_probability,
            "suggested_label": self.suggested_label,
        }
        if isinstance(dataset, dict):
            length = len(next(iter(dataset.values()), ()))
        elif hasattr(dataset, "add_column"):
            length = len(dataset)
        else:
            raise TypeError(
                f"dataset is {type(dataset).__name__}: pass a dict of columns or a datasets.Dataset"
            )
        if length != len(self.wrong_probability):
            raise ValueError(
                f"dataset has {length} rows, the training set had {len(self.wrong_probability)}: "
                "pass the one that was cleaned"
            )
        if isinstance(dataset, dict):
            return {**dataset, **columns}
        for name, values in columns.items():
            dataset = dataset.add_column(name, values.tolist())
        return dataset

    def report(self) -> str:
        """A few lines: how many labels are wrong, how sure that is, what was spent."""
        wrong = self.wrong_probability
        expected, sure = float(wrong.sum()), int((wrong > SURE).sum())
        rate = 1 - float(np.diag(self.confusion).mean())
        lines = [
            f"{expected:,.0f} of {len(wrong):,} labels are expected to be wrong, {sure:,} of them "
            f"with probability above {SURE}",
            f"a label of an average class is wrong with probability {rate:.2f}",
            f"spent: {self.plain_step_equivalents:.2f} plain trainings of this length",
        ]
        return "\n".join((*lines, *self.notes))
