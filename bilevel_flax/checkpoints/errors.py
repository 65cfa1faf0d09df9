"""What can go wrong with a checkpoint, in one line each."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is one line for the user.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state, directory = solver.init(jnp.array(0.5), jnp.array(2.0)), tempfile.mkdtemp()
        >>> bf.checkpoints.restore(directory, state)
        Traceback (most recent call last):
            ...
        bilevel_flax.checkpoints.errors.CheckpointError: ...
    """


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint, but of another model.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax, bilevel_flax as bf
        >>> problem = bf.Problem(lambda z, x, b: (z - x * b) ** 2, lambda z, x, b: (z - b) ** 2)
        >>> solver = bf.soba(problem, inner=optax.sgd(0.1), outer=optax.sgd(0.1))
        >>> state, directory = solver.init(jnp.array(0.5), jnp.array(2.0)), tempfile.mkdtemp()
        >>> bf.checkpoints.save(directory, 0, state)
        >>> other = solver.init(jnp.zeros(3), jnp.array(2.0))
        >>> bf.checkpoints.restore(directory, other)
        Traceback (most recent call last):
            ...
        bilevel_flax.checkpoints.errors.CheckpointMismatch: ...
    """


class Damaged(Exception):
    """One checkpoint cannot be used; the message says why, in one line."""


def reason(error: BaseException) -> str:
    """An error in one short line; Orbax's and tensorstore's run over many."""
    text = " ".join(str(error).split())
    for sign, plain in _PLAIN_REASONS.items():
        if sign in text:
            return plain
    if not isinstance(error, RuntimeError):  # of which the text alone makes a sentence
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


_PLAIN_REASONS = {
    "No space left on device": "no space left on the disk",
    "Disk quota exceeded": "the disk quota is exceeded",
    "File too large": "a file would exceed the size limit",
    "Read-only file system": "the file system is read-only",
    "Permission denied": "no permission to write there",
}
