"""The documents: every Python block runs as printed, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import bilevel_flax as bf

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [
    *DOCS,
    *(ROOT / "docs").glob("gallery/*.md"),
    CONTRIBUTING,
    *(ROOT / "benchmarks").rglob("*.md"),
    *ROOT.glob("examples/*/*.md"),
]
BLOCKS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{i}")
    for page in [*DOCS, *ROOT.glob("examples/*/README.md")]
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code, capsys):
    exec(compile(code, "<docs>", "exec"), {})


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@every_page
def test_files_that_a_page_names_are_there(page):
    named = re.findall(
        r"\b((?:bilevel_flax|benchmarks|configs|docs|examples|tests)/[\w/.-]*\w\.(?:py|md|csv))",
        page.read_text(),
    )
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_the_readme_is_a_screen_and_a_half_and_says_nothing_twice():
    lines = [line.strip() for line in README.read_text().splitlines() if line.strip()]
    assert len(lines) < 70
    assert len(set(lines)) == len(lines)
    links = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert len(set(links)) == len(links)


def test_every_page_is_reached_from_the_readme():
    found, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        links = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text())
        for listed in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            names = [line for line in listed.split("\n") if line and not line.startswith(":")]
            names = [re.sub(r".*<(.+)>$", r"\1", name) for name in names]
            links += [f"{name}.md" for name in names if not name.startswith("api/")]
        new = {(page.parent / link).resolve() for link in links} - found
        found |= new
        waiting += new
    assert {page.resolve() for page in DOCS[1:]} <= found


def test_the_loop_of_the_readme_jits_once_and_finds_the_wrong_example(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    body = code[code.index("\nfor ") :]
    assert "jax.jit" in code
    assert "jax.jit" not in body
    names = {}
    exec(code, names)
    x = names["state"].outer_params
    assert x[3] < -1 < 0 < x[:3].min()


def test_the_version_is_said_once():
    assert f"version: {bf.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
