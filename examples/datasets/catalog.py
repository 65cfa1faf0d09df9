"""What TFDS has registered under a name, looked up without importing it.

Importing TFDS takes longer than a user should wait to hear that a file is missing, and its
downloader retries for minutes where there is no network. So the tables of checksums that ship with
it are read directly.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import pathlib
import socket
import threading
import urllib.parse
import urllib.request


@dataclasses.dataclass(frozen=True)
class Original:
    """An original file: its address, size in bytes, sha256 and name in a manual_dir."""

    url: str
    size: int
    sha256: str
    filename: str


def originals(name: str) -> list[Original]:
    """The original files that TFDS registers for a data set.

    Args:
        name: without configuration and version ("emnist", not "emnist/balanced").

    Returns:
        Empty where TFDS registers none.
    """
    path = _tables().get(name)
    if path is None:
        return []
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return [Original(r[0], int(r[1]), r[2], r[3]) for r in rows if len(r) == 4 and r[3]]


def known(name: str) -> bool:
    """Whether TFDS registers files under this name."""
    return name in _tables()


def nearest(name: str, first: list[str]) -> str:
    """The known name most like `name`, for an error message; `first` is preferred."""
    for names in (first, sorted(_tables())):
        near = difflib.get_close_matches(name, names, 1)
        if near:
            return near[0]
    return first[0]


def verify(path: pathlib.Path, original: Original) -> None:
    """Compares a file with what TFDS registered.

    Args:
        path: the file.
        original: what it should be.

    Raises:
        ValueError: size or sha256 differ; names the file.
    """
    size = path.stat().st_size
    if size != original.size:
        raise ValueError(
            f"{path} is {size} bytes, but the original has {original.size}: "
            "the file is truncated or another one, fetch it again"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != original.sha256:
        raise ValueError(
            f"{path} has the wrong checksum (sha256 {digest[:12]}..., expected "
            f"{original.sha256[:12]}...): the file is corrupted, fetch it again"
        )


def reachable(url: str, timeout: float = 0.7) -> bool:
    """Whether a connection to the url's host opens within `timeout` seconds.

    Args:
        url: http or https; where the environment names a proxy, that is what is asked.
        timeout: seconds for the look-up of the name and the connection together.
    """
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.netloc):
        parts = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
    address = (parts.hostname, parts.port or (80 if parts.scheme == "http" else 443))
    opened = threading.Event()

    def attempt():
        try:
            socket.create_connection(address, timeout=timeout).close()
            opened.set()
        except OSError:
            pass

    # The name's look-up knows no timeout, so it is left behind in a thread when it takes too long.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout)
    return opened.is_set()


@functools.cache
def _tables() -> dict[str, pathlib.Path]:
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = pathlib.Path(spec.submodule_search_locations[0])
    tables = {path.stem: path for path in (root / "url_checksums").glob("*.txt")}
    tables |= {path.parent.name: path for path in root.glob("datasets/*/checksums.tsv")}
    return tables
