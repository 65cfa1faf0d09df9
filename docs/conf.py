"""The site, out of the repository's own Markdown: `make docs`.

The source folder is the repository's root, so that a link which leads somewhere in a checkout leads
to the same page of the site: pages of `examples/` and `benchmarks/` are pages of it, too.
"""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tutorials import the package and `examples`, from whatever folder they are run in.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# A profile of its own: nobody's startup files change a tutorial, and a warning of the build is one
# of its own (kernels print one on their sockets).
profile = ROOT / "docs" / "_build" / "ipython" / "profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 'ERROR'\n")
os.environ["IPYTHONDIR"] = str(profile.parent)

project = "bilevel_flax"
author = "The bilevel_flax authors"
project_copyright = author
release = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "bilevel_flax" / "__init__.py").read_text(), re.MULTILINE
)[1]
version = release

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "examples/*/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
]
exclude_patterns = ["docs/_*", "**/.*", "**/__pycache__"]

extensions = [
    "api_pages",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinxcontrib.katex",
]
nitpicky = True
# Names in signatures that other packages define, and type variables. Ours must resolve.
nitpick_ignore_regex = [
    ("py:.*", r"(?!bilevel_flax\.).*"),
    # Of signatures, what is returned or handed on but never named by a user.
    ("py:.*", r".*\.(_T|RowTransformation|LearnedMixture|MetricWriter|Directions|Goals|Draws)"),
]
suppress_warnings = ["myst.header"]  # pages of `examples/` begin at any level
linkcheck_ignore = [r"https?://"]  # links within the site; the net is not the build's business

highlight_language = "none"
default_role = "literal"
pygments_style = "default"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = os.environ.get("BILEVEL_FLAX_TUTORIALS", "cache")
nb_execution_cache_path = str(ROOT / "docs" / "_build" / "tutorials")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Reference", "references_style")]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90

# Formulas without a network: the browser lays out MathML, which needs no fonts of KaTeX's.
katex_css_path = "katex-math.css"
katex_options = 'output: "mathml"'

html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"bilevel_flax {release}"
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": True,
    "home_page_in_toc": True,
    "navbar_persistent": [],
}
templates_path = ["_templates"]
html_additional_pages = {"index": "to_index.html"}
html_copy_source = False
html_show_sourcelink = False
