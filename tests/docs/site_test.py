"""The site: what is public is documented, questions have answers, tutorials run."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from bilevel_flax import cli
from bilevel_flax.solvers import table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), *DOCS.glob("gallery/*.md"), *(ROOT / "benchmarks").rglob("*.md")]
TUTORIALS = sorted(path for path in DOCS.glob("gallery/*.md") if path.stem != "index")
CELL = re.compile(r"```\{code-cell\}\n(.*?)```", re.DOTALL)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def public_names():
    sys.path.insert(0, str(DOCS / "_ext"))
    import public_names

    yield public_names
    sys.path.remove(str(DOCS / "_ext"))


def test_every_public_name_has_a_docstring_and_an_example(public_names):
    assert public_names.faults() == []
    assert len({p.path for names in public_names.pages().values() for p in names}) > 150


def test_a_name_without_docstring_or_example_is_named(public_names, monkeypatch):
    def bare():
        pass

    def told():
        """One line."""

    module = types.ModuleType("bilevel_flax.made_up", "A namespace.")
    for function in (bare, told):
        function.__module__ = module.__name__
        setattr(module, function.__name__, function)
    module.__all__ = ["bare", "told", "LIMIT"]
    module.LIMIT = 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(public_names, "NAMESPACES", (module.__name__,))
    assert public_names.faults() == [
        "bilevel_flax.made_up.bare: no docstring",
        "bilevel_flax.made_up.told: no example",
        "bilevel_flax.made_up.LIMIT: its module's docstring does not say what it is",
    ]


def test_a_public_module_without_a_page_is_named(public_names, monkeypatch):
    without = tuple(n for n in public_names.NAMESPACES if n != "bilevel_flax.recipes")
    monkeypatch.setattr(public_names, "NAMESPACES", without)
    assert "bilevel_flax.recipes: a public module without a page" in public_names.faults()


def test_the_table_of_methods_is_the_librarys():
    assert table.markdown() in (DOCS / "choosing.md").read_text()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@each_page
def test_anchors_are_there(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", page.read_text()):
        other = (page.parent / target).resolve() if target else page
        assert anchor in anchors(other), f"{target}#{anchor}"


def test_ten_questions_are_answered_one_click_away():
    index = (DOCS / "index.md").read_text()
    section = index.split("## Ten questions")[1].split("```")[0]
    rows = re.findall(r"^\| ([^|]+[?.]) \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) == 10
    assert all("](" in answer for _, answer in rows)


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        for toctree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            names = [line for line in toctree.split("\n") if line and not line.startswith(":")]
            names = [re.sub(r".*<(.+)>$", r"\1", name) for name in names]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert {page for page in PAGES if page != DOCS / "index.md"} <= listed


@pytest.fixture(scope="module")
def usage():
    """The options of each command of the command line."""
    commands = next(
        action.choices for action in cli.parser()._actions if isinstance(action.choices, dict)
    )
    return {name: set(command._option_string_actions) for name, command in commands.items()}


@each_page
def test_commands_are_the_command_lines(page, usage):
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"(?:^    |`)(bilevel-flax [^`\n]+)", text, re.MULTILINE):
        for command in line.split("&&"):
            words = shlex.split(command.split(" #")[0].rstrip("&; "))
            if words[:1] != ["bilevel-flax"] or not words[1:2] or words[1].startswith("-"):
                continue
            options = usage[words[1]]
            given = {
                word.strip("[]").split("=")[0] for word in words if word.startswith(("--", "[--"))
            }
            unknown = {option for option in given if not option.startswith("--config.")} - options
            assert not unknown, f"{command}: {sorted(unknown)}"


def test_no_python_stands_in_a_block_that_does_not_run():
    # Packages that are not installed here, and a launcher's own syntax; the rest must be ```python.
    allowed = {"trainers.md": 3, "mixture_export.md": 1, "citation.md": 1}
    others = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("examples/*/README.md")]
    for page in [*PAGES, *others]:
        languages = re.findall(r"^```([^\n{]+)$", page.read_text(), re.MULTILINE)
        silent = [language for language in languages if language not in ("python", "diff")]
        assert len(silent) == allowed.get(page.name, 0), page.name
        indented = re.findall(
            r"^    (?:import|from|def|for \w+ in) .*$", page.read_text(), re.MULTILINE
        )
        outside = [line for line in indented if line not in "".join(blocks(page))]
        assert not [line for line in outside if "; do " not in line], page.name


def blocks(page: Path) -> list[str]:
    """A page's fenced blocks."""
    return re.findall(r"```.*?```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_in_a_short_form(tutorial, capsys, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("sklearn")
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    text = tutorial.read_text()
    assert text.startswith("---\njupytext:")
    assert text.count("```{code-cell}") == len(CELL.findall(text))
    # As long as it takes to come once through everything.
    short = {"STEPS": 10, "UPDATES": 12}
    names = {}
    for number, code in enumerate(CELL.findall(text)):
        for name, value in short.items():
            code = re.sub(rf"^({name}\b.*?= ?)\d+", rf"\g<1>{value}", code, flags=re.MULTILINE)
        code = re.sub(r"STEPS // \d+", "1", code)  # how often something is written down
        exec(compile(code, f"{tutorial.stem}[{number}]", "exec"), names)
    assert "STEPS" in names or "UPDATES" in names
