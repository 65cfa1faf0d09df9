"""The extras: which module needs which, and the one line that says how to install it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

# Top-level modules by extra, as `pyproject.toml` lists their distributions.
EXTRAS = {
    "train": (
        "etils",
        "grain",
        "matplotlib",
        "ml_collections",
        "orbax",
        "PIL",
        "tensorboardX",
        "tqdm",
    ),
    "datasets": (
        "importlib_resources",
        "mlxtend",
        "scipy",
        "sklearn",
        "tensorflow_datasets",
    ),
    "fixed_point": ("lineax", "optimistix"),
    "plan": ("libtpu",),
}


class MissingExtra(ModuleNotFoundError):
    """A module of an extra is not installed; the message is one line that names the extra."""


def explain(error: BaseException | None) -> str | None:
    """The line for an import that failed for want of an extra; None for any other error.

    Args:
        error: what was caught; what it was raised from is looked at as well.
    """
    while error is not None:
        if isinstance(error, MissingExtra):
            return str(error)
        if isinstance(error, ModuleNotFoundError) and error.name:
            name = error.name.partition(".")[0]
            for extra, modules in EXTRAS.items():
                if name in modules:
                    return _line(name, extra)
        error = error.__cause__
    return None


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Around imports: one that fails for want of an extra names it.

    Example:
        >>> with named():
        ...     import optax

    Raises:
        MissingExtra: a module of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = explain(error)
        if message is None:
            raise
        raise MissingExtra(message, name=error.name) from error


def require(extra: str) -> None:
    """Raises unless all modules of an extra are installed.

    Args:
        extra: a key of `EXTRAS`.

    Raises:
        MissingExtra: one is not.
    """
    for name in EXTRAS[extra]:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(_line(name, extra), name=name)


def _line(module: str, extra: str) -> str:
    return f"{module} is not installed: pip install 'bilevel-flax[{extra}]'"
