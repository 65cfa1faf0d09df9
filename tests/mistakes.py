"""What is asserted of every row of a table of mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest


def assert_one_line(call: Callable[[], object], error: type[Exception], words: str) -> None:
    """`call` raises `error` with one line that has the words, in their order."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert re.search(words, message), message
    assert "\n" not in message
    assert len(message) < 400
