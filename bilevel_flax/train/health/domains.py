"""Domains of which a run has no example, so that nothing can be learned of their weights."""

from __future__ import annotations

import numpy as np

from bilevel_flax.train.task import Task

ABSENT = "absent_domains"  # the warning's name


def warnings_of(task: Task) -> dict[str, str]:
    """The warning about domains that are in no inner minibatch, by name; {} if there is none."""
    batches = task.inner.batches
    if not task.domains or task.inner.streamed or "domain" not in batches:
        return {}
    present = set(np.unique(batches["domain"]).tolist())
    absent = [name for number, name in enumerate(task.domains) if number not in present]
    if not absent:
        return {}
    text = (
        f"no minibatch holds an example of {', '.join(absent)}: there is nothing to learn a weight "
        "by, and it stands still. Give the domain more text or examples, or leave it out"
    )
    return {ABSENT: text}
