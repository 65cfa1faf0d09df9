"""Genotypes: derived by DARTS's rule, written and read back, refused with a reason, drawn."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from bilevel_flax.train.config import ConfigError
from examples.darts import draw, genotype
from examples.darts.genotype import EDGES, OPERATIONS

SVG = "{http://www.w3.org/2000/svg}"


def shares(strong: dict[tuple[int, int], tuple[str, float]]) -> np.ndarray:
    """Equal shares, but for one operation on some edges."""
    found = np.full((14, 8), 1 / 8)
    for edge, (operation, share) in strong.items():
        row = found[EDGES.index(edge)]
        row[:] = (1 - share) / 7
        row[OPERATIONS.index(operation)] = share
    return found


def test_edges_are_darts_edges():
    assert len(EDGES) == 14
    assert EDGES[:5] == ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3))


def test_every_node_keeps_its_two_strongest_edges():
    weights = shares(
        {
            (0, 2): ("sep_conv_3x3", 0.6),
            (1, 2): ("max_pool_3x3", 0.5),
            (1, 3): ("dil_conv_5x5", 0.3),
            (2, 3): ("skip_connect", 0.4),
            (0, 4): ("avg_pool_3x3", 0.9),
            (3, 4): ("sep_conv_5x5", 0.2),
            (4, 5): ("dil_conv_3x3", 0.8),
            (0, 5): ("skip_connect", 0.3),
        }
    )
    cell = genotype.derive({"normal": weights, "reduce": weights}).normal
    assert cell == (
        (("sep_conv_3x3", 0), ("max_pool_3x3", 1)),
        (("dil_conv_5x5", 1), ("skip_connect", 2)),
        (("avg_pool_3x3", 0), ("sep_conv_5x5", 3)),
        (("skip_connect", 0), ("dil_conv_3x3", 4)),
    )


def test_an_edge_that_is_mostly_none_is_weak_and_none_is_never_kept():
    # 0-3 has the largest share of all, but it is `none`: what is left of it is 0.02 each.
    weights = shares({(0, 3): ("none", 0.86), (1, 3): ("none", 0.2), (2, 3): ("none", 0.3)})
    node = genotype.derive({"normal": weights, "reduce": weights}).normal[1]
    assert [start for _, start in node] == [1, 2]
    assert all(name != "none" for name, _ in node)


@pytest.mark.parametrize("bad", [np.zeros((14, 8)), np.full((13, 8), 1 / 8), np.full((14, 8), 1.0)])
def test_derive_refuses_what_are_no_shares(bad):
    with pytest.raises(ValueError, match="weights of normal"):
        genotype.derive({"normal": bad, "reduce": bad})


@pytest.mark.parametrize("seed", range(5))
def test_json_round_trip(tmp_path, seed):
    found = genotype.random_genotype(seed)
    assert genotype.load(genotype.save(tmp_path / "g.json", found)) == found


def test_random_cells_differ_and_cover_the_space():
    drawn = [genotype.random_genotype(seed) for seed in range(40)]
    assert len(set(drawn)) == 40
    edges = [edge for found in drawn for cell in found for node in cell for edge in node]
    assert {name for name, _ in edges} == set(OPERATIONS) - {"none"}
    # 640 draws of 7 operations: 91 each, more than four standard deviations (35) away is no chance.
    counts = [sum(name == operation for name, _ in edges) for operation in OPERATIONS[1:]]
    assert max(abs(count - 640 / 7) for count in counts) < 36
    for found in drawn:
        for cell in found:
            assert all(len({start for _, start in node}) == 2 for node in cell)


def broken(change) -> dict:
    content = json.loads(json.dumps(genotype.as_json(genotype.random_genotype(0))))
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g["normal"][0][0].__setitem__(0, "sep_conv_3x4"), 'mean "sep_conv_3x3"'),
        (lambda g: g["reduce"].pop(), "reduce has 3 nodes, a cell of this space has 4"),
        (lambda g: g["normal"].append(g["normal"][0]), "normal has 5 nodes"),
        (lambda g: g["normal"][1].pop(), "normal, node 1: needs 2 edges"),
        (lambda g: g["normal"][1][0].__setitem__(1, 3), "states 0 to 2 come before"),
        (lambda g: g["normal"][1][0].__setitem__(1, True), "comes from state True"),
        (lambda g: g["normal"][2].__setitem__(0, "skip_connect"), "is no edge"),
        (lambda g: g.pop("reduce"), "a genotype is"),
        (lambda g: g.__setitem__("space", "nas_bench_201"), "'nas_bench_201', not of 'darts'"),
        (lambda g: g.__setitem__("normal", 3), "normal has 0 nodes"),
    ],
)
def test_bad_genotypes_are_refused_in_one_line(tmp_path, change, says):
    path = tmp_path / "g.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        genotype.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_genotypes(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        genotype.load(tmp_path / "none.json")
    (tmp_path / "g.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        genotype.load(tmp_path / "g.json")


@pytest.mark.parametrize("seed", range(3))
def test_the_picture_holds_every_state_and_every_edge(tmp_path, seed):
    found = genotype.random_genotype(seed)
    for path, cell in zip(draw.save(tmp_path, found), found, strict=True):
        root = ElementTree.fromstring(path.read_text())
        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert len(list(root.iter(f"{SVG}circle"))) == 2 + 4 + 1
        assert len(list(root.iter(f"{SVG}rect"))) == 8
        assert len(list(root.iter(f"{SVG}path"))) == 2 * 8 + 4  # in and out of 8 boxes; the output
        for operation in OPERATIONS:
            drawn = texts.count(operation.replace("_", " "))
            assert drawn == sum(name == operation for node in cell for name, _ in node)


def test_every_edge_of_the_picture_starts_at_its_state():
    found = genotype.random_genotype(3)
    root = ElementTree.fromstring(draw.cell_svg(found.normal))
    at = {
        name: (circle.get("cx", ""), circle.get("cy", ""))
        for circle, name in zip(
            root.iter(f"{SVG}circle"), ["c k-2", "c k-1", "0", "1", "2", "3", "c k"], strict=True
        )
    }
    states = list(at)
    starts = [path.get("d", "").split(" ")[0][1:] for path in root.iter(f"{SVG}path")]
    into_boxes = [starts[i] for i in range(0, len(starts)) if i % 5 in (0, 2)]
    wanted = [",".join(at[states[start]]) for node in found.normal for _, start in node]
    assert into_boxes == wanted


def test_collapse_and_shares_of_operations():
    skips = tuple(((("skip_connect", 0), ("max_pool_3x3", 1))) for _ in range(4))
    convs = tuple(((("skip_connect", 0), ("dil_conv_3x3", 1))) for _ in range(4))
    assert genotype.collapsed(genotype.Genotype(skips, convs))
    assert not genotype.collapsed(genotype.Genotype(convs, skips))
    assert genotype.share_of(genotype.Genotype(skips, convs), "skip_connect") == 0.5
