"""What a search adds to a run's report."""

from pathlib import Path

from bilevel_flax.report import Section


def sections(workdir: str | Path) -> list[Section]:
    """Placeholder."""
    return []
