"""What a report is made of: sections with a figure, a table or small pictures, as plain HTML."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from bilevel_flax.train.metrics.units import format_value


class Section(NamedTuple):
    """One part of a report.

    Attributes:
        title: Plain text.
        html: The body, trusted as it is: whoever builds one escapes what comes from outside.
    """

    title: str
    html: str


def figure_section(title: str, figure: Figure, caption: str = "") -> Section:
    """A section that shows a matplotlib figure as inline SVG.

    Black and white of the figure follow the reader's theme; other colours stay.

    Args:
        title: Plain text.
        figure: Made with `matplotlib.figure.Figure`, or by `plots.new_figure`.
        caption: Plain text under the figure.
    """
    return Section(title, figure_html(figure, title, caption))


def table_section(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = ""
) -> Section:
    """A section with a table; numbers stand to the right.

    Args:
        title: Plain text.
        header: One name per column.
        rows: Cells: text is shown as it is, floats with four digits.
        caption: Plain text under the table.

    Raises:
        ValueError: If a row has not as many cells as the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows: {row!r} has {len(row)} cells for {len(header)} columns")
    columns = zip(*rows, strict=True) if rows else ([""] for _ in header)
    numeric = [all(isinstance(v, int | float | np.number) for v in column) for column in columns]
    marks = [' class="number"' if number else "" for number in numeric]
    head = "".join(f"<th{m}>{html.escape(h)}</th>" for m, h in zip(marks, header, strict=True))
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{m}>{html.escape(format_value(v))}</td>" for m, v in zip(marks, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return Section(title, f'<div class="scroll">{table}</div>' + note_html(caption))


def gallery_section(
    title: str,
    images: np.ndarray,
    captions: Sequence[str],
    caption: str = "",
    marks: Sequence[bool | None] | None = None,
) -> Section:
    """A section of small pictures.

    Args:
        title: Plain text.
        images: uint8 [k, h, w], or [k, h, w, c] with 1, 3 or 4 channels.
        captions: k plain texts; a newline in one breaks the line.
        caption: Plain text above the pictures.
        marks: True frames a picture as a hit, False as a miss, None not at all.

    Raises:
        ValueError: If the shapes or the dtype do not fit.
    """
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or not (
        images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (3, 4))
    ):
        raise ValueError(
            f"images: expected uint8 [k, h, w] or [k, h, w, c] with 1, 3 or 4 channels, got "
            f"{images.dtype} {images.shape}"
        )
    marks = [None] * len(images) if marks is None else marks
    for name, values in (("captions", captions), ("marks", marks)):
        if len(values) != len(images):
            raise ValueError(f"{name}: {len(values)} of them for {len(images)} images")
    frame = {True: ' class="hit"', False: ' class="miss"', None: ""}
    tiles = "".join(
        f'<div{frame[None if mark is None else bool(mark)]}><img alt="{html.escape(text)}" '
        f'src="{_png(image)}"><span>{html.escape(text)}</span></div>'
        for image, text, mark in zip(images, captions, marks, strict=True)
    )
    note = f"<p>{html.escape(caption)}</p>" if caption else ""
    return Section(title, f'{note}<div class="gallery">{tiles}</div>')


def compare_in_words(
    quantity: str, ours: tuple[str, float], others: Mapping[str, float], unit: str = ""
) -> str:
    """One sentence for a report's top: what one would hand over, or plainly that it did not pay.

    Args:
        quantity: what is compared; low is good.
        ours: what was learned and its value.
        others: what one could have had without, and their values.
        unit: as `Task.units`.

    >>> compare_in_words("test error", ("the refit network", 0.1), {"all data": 0.2}, "fraction")
    'The refit network has a test error of 10.00 %, against 20.00 % with all data.'
    >>> compare_in_words("test error", ("the refit network", 0.2), {"all data": 0.1}, "fraction")
    'It did not pay here: all data did better, with a test error of 10.00 % against 20.00 % of \
the refit network.'
    """
    label, value = ours
    shown = {name: format_value(other, unit) for name, other in others.items()}
    best = min(others, key=lambda name: others[name], default="")
    if others and others[best] <= value:
        did = "better" if others[best] < value else "as well"
        return (
            f"It did not pay here: {best} did {did}, with a {quantity} of {shown[best]} against "
            f"{format_value(value, unit)} of {label}."
        )
    against = ", ".join(f"{text} with {name}" for name, text in shown.items())
    return f"{label[:1].upper()}{label[1:]} has a {quantity} of {format_value(value, unit)}" + (
        f", against {against}." if against else "."
    )


def figure_html(figure: Figure, title: str, caption: str = "") -> str:
    """A figure as inline SVG with its caption."""
    note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll">{_svg(figure, title)}</div>{note}</figure>'


def curve_grid(figures: Sequence[tuple[str, Figure]]) -> str:
    """Figures with their titles side by side, as many as fit."""
    cells = "".join(
        f"<div><h3>{html.escape(title)}</h3>{figure_html(figure, title)}</div>"
        for title, figure in figures
    )
    return f'<div class="grid">{cells}</div>'


def _svg(figure: Figure, title: str) -> str:
    try:
        text = _drawn(figure, title)
    except ValueError:
        # A name with dollars in it (a metric's, a domain's) is no TeX: all text as it stands.
        for label in figure.findobj(Text):
            label.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue]
        text = _drawn(figure, title)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # An attribute of the root alone: rectangles inside have a width too.
    root, rest = text.split(">", 1)
    text = re.sub(r'\s(xmlns|xmlns:xlink|width|height)="[^"]*"', "", root) + ">" + rest
    text = text.replace("xlink:href", "href")
    # Names such as axes_1 would stand in the page once for every figure, and nothing uses them.
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    # Black and white of the figure become the page's own ink and paper.
    text = re.sub(r"(fill|stroke): #000000", r"\1: currentColor", text)
    text = re.sub(r"(fill|stroke): #ffffff", r"\1: var(--paper)", text)
    # About as wide as drawn: text in a blown-up figure shouts, and on a phone nobody can read it.
    width = 108 * figure.get_figwidth()
    size = f"max-width: {width:.0f}px; min-width: {0.6 * width:.0f}px"
    mark = f'<svg role="img" aria-label="{html.escape(title)}" style="{size}"'
    return text.replace("<svg", mark, 1).strip()


def _drawn(figure: Figure, title: str) -> str:
    stream = io.StringIO()
    # Text stays text (small, sharp, selectable); the salt keeps the ids of two figures apart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": ascii(title)}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
    return stream.getvalue()


def _png(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def note_html(text: str) -> str:
    """A remark in faint print; nothing for an empty text."""
    return f'<p class="note">{html.escape(text)}</p>' if text else ""
