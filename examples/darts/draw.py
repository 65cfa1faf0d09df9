"""A derived cell as a picture (SVG): states from left to right, operations as boxes between."""

from __future__ import annotations

import html
from pathlib import Path

from examples.darts.genotype import CELLS, INPUTS, NODES, Cell, Genotype

_COLUMN, _ROW = 236, 92  # of a node and the operations into it
_LEFT, _TOP = 96, 52
_BOX = (118, 26)
_RADIUS = 19
# Mid tones that read on white and on black; by the first word of an operation.
_COLOURS = {"max": "#e8833a", "avg": "#c2a018", "skip": "#8a94a3", "sep": "#3f87e5"}
_DILATED = "#2fa36b"
_INPUTS = ("c k-2", "c k-1")


def cell_svg(cell: Cell, title: str = "") -> str:
    """The cell as one <svg> element.

    Every state is a <circle>, every edge a <rect> with its operation's name and a <path> in and
    out of it.

    Args:
        cell: of a genotype.
        title: read out for those who do not see the picture.
    """
    width = _LEFT + NODES * _COLUMN + 110
    height = 2 * _TOP + (NODES - 1) * _ROW
    places = {0: (_LEFT - 50, _TOP + _ROW // 2), 1: (_LEFT - 50, height - _TOP - _ROW // 2)}
    for node in range(NODES):
        places[INPUTS + node] = (_LEFT + (node + 1) * _COLUMN - 20, _TOP + node * _ROW)
    out = (width - 40, height // 2)
    lines, boxes = [], []
    for state, edges in enumerate(cell, INPUTS):
        x, y = places[state]
        for number, (operation, start) in enumerate(edges):
            box = (x - 170, y - 32 + 38 * number)
            middle = box[1] + _BOX[1] / 2
            lines.append(_path(places[start], (box[0], middle), _colour(operation)))
            lines.append(_path((box[0] + _BOX[0], middle), (x, y), _colour(operation)))
            boxes.append(_box(box, operation))
        lines.append(_path((x, y), out, "#8a94a3", dashed=True))
    states = [_circle(places[i], name) for i, name in enumerate(_INPUTS)]
    states += [_circle(places[INPUTS + node], str(node)) for node in range(NODES)]
    states.append(_circle(out, "c k"))
    label = html.escape(title or "a cell")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{label}" style="max-width: {width}px" font-family="sans-serif" '
        f'font-size="13">\n<title>{label}</title>\n'
        + "\n".join([*lines, *boxes, *states, "</svg>"])
    )


def _colour(operation: str) -> str:
    return _COLOURS.get(operation.partition("_")[0], _DILATED)


def _path(start, end, colour: str, dashed: bool = False) -> str:
    (x0, y0), (x1, y1) = start, end
    bend = (x1 - x0) / 2
    dash = ' stroke-dasharray="4 4" opacity="0.6"' if dashed else ""
    return (
        f'<path d="M{x0:g},{y0:g} C{x0 + bend:g},{y0:g} {x1 - bend:g},{y1:g} {x1:g},{y1:g}" '
        f'fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>'
    )


def _box(corner, operation: str) -> str:
    (x, y), (width, height) = corner, _BOX
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="6" '
        f'fill="{_colour(operation)}"/>'
        f'<text x="{x + width / 2:g}" y="{y + height / 2 + 4.5:g}" text-anchor="middle" '
        f'fill="#ffffff">{html.escape(operation.replace("_", " "))}</text>'
    )


def _circle(place, name: str) -> str:
    x, y = place
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="{_RADIUS}" fill="#5a6472"/>'
        f'<text x="{x:g}" y="{y + 4.5:g}" text-anchor="middle" fill="#ffffff" '
        f'font-size="{12 if len(name) < 4 else 10}">{html.escape(name)}</text>'
    )


def save(folder: Path, genotype: Genotype) -> list[Path]:
    """Writes normal.svg and reduce.svg into a folder; returns their paths."""
    written = []
    for name, cell in zip(CELLS, genotype, strict=True):
        path = folder / f"{name}.svg"
        path.write_text(cell_svg(cell, f"{name} cell"), encoding="utf-8")
        written.append(path)
    return written
