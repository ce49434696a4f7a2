"""The documentation site, built by ``make docs`` from these pages, docstrings and notebooks."""

from pathlib import Path

import stablegrad_optax

HERE = Path(__file__).parent
ROOT = HERE.parent

# Sphinx reads nothing outside its own folder, and there this folder is not called docs.
(HERE / "notebooks").mkdir(exist_ok=True)
for notebook in (ROOT / "notebooks").glob("*.ipynb"):
    text = notebook.read_text(encoding="utf-8").replace("](../docs/", "](../")
    (HERE / "notebooks" / notebook.name).write_text(text, encoding="utf-8")

project = "stablegrad_optax"
author = "The stablegrad_optax authors"
project_copyright = author
version = release = stablegrad_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the test suite runs them; the site shows what is committed
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # Args has them in words
copybutton_exclude = ".linenos, .gp, .go"  # the prompt and the output of an example

html_theme = "sphinx_book_theme"
html_title = "stablegrad_optax"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {
    "navbar_persistent": [],  # the sidebar has the search
    "show_navbar_depth": 1,
    "use_download_button": False,
}
