"""A Sphinx extension: one page a namespace, out of its docstrings, before the sources are read."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import public_names
from public_names import Public
from sphinx.application import Sphinx
from sphinx.util import logging

SHORT = {"bilevel_flax": "bf", "bilevel_flax.solvers.adjoint_optimisers": "bf.adjoint"}


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", _write_pages)
    app.connect("autodoc-skip-member", _skip_field)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write_pages(app: Sphinx) -> None:
    for fault in public_names.faults():
        logging.getLogger(__name__).warning(fault)
    folder = Path(app.srcdir) / "docs" / "api"
    folder.mkdir(exist_ok=True)
    pages = public_names.pages()
    for namespace, names in pages.items():
        _write(folder / f"{namespace}.md", _page(namespace, names))
    table = "\n".join(f"| [`{_title(name)}`]({name}.md) | {_first_line(name)} |" for name in pages)
    toctree = "```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```"
    _write(folder / "index.md", f"# API reference\n\n| | |\n|---|---|\n{table}\n\n{toctree}\n")


def _title(namespace: str) -> str:
    return SHORT.get(namespace, namespace.replace("bilevel_flax.", "bf.", 1))


def _first_line(namespace: str) -> str:
    docstring = inspect.getdoc(importlib.import_module(namespace)) or ""
    return docstring.partition("\n")[0].replace("|", "\\|").replace("*", "\\*")


def _write(path: Path, text: str) -> None:
    # An unchanged page keeps its date, so that Sphinx does not read it again.
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _page(namespace: str, names: list[Public]) -> str:
    documented = sorted((name for name in names if not name.is_constant), key=_order)
    # Relative, as autosummary asks for where the page's module is a name's own.
    summary = "\n".join(f"   {public.path.removeprefix(f'{namespace}.')}" for public in documented)
    body = "\n".join(map(_entry, documented))
    return f"""# `{_title(namespace)}`

```{{eval-rst}}
.. automodule:: {namespace}

.. currentmodule:: {namespace}

.. autosummary::
   :nosignatures:

{summary}

{body}
```
"""


def _order(public: Public) -> tuple[bool, str]:
    return inspect.isclass(public.value), public.name.lower()


def _entry(public: Public) -> str:
    if inspect.isclass(public.value):
        return f".. autoclass:: {public.path}\n   :members:\n"
    return f".. autofunction:: {public.path}\n"


def _skip_field(app: Sphinx, what: str, name: str, value: Any, *rest: Any) -> bool | None:
    """Fields of records are described under Attributes, not once more as members."""
    documented = (property, classmethod, staticmethod)
    is_field = what == "class" and not callable(value) and not isinstance(value, documented)
    return True if is_field else None
