"""The README's example and the notebooks run as they stand, and links lead somewhere.

Those of the site's own pages are checked by ``make docs``.
"""

import re
from pathlib import Path

import nbformat
import pytest
from documents import variables_after_each_block
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.standard_promotion
def test_readme_example_trains_its_network(capsys: pytest.CaptureFixture[str]) -> None:
    (variables,) = variables_after_each_block(ROOT / "README.md")
    first, last = float(variables["losses"][0]), float(variables["losses"][-1])
    assert last < first / 100
    assert capsys.readouterr().out.startswith(str(variables["losses"][0]))


@pytest.mark.parametrize(
    "path",
    [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_links_inside_the_repository_lead_to_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path in NOTEBOOKS:
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_has_its_outputs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is not None for cell in cells), "committed without outputs"

    monkeypatch.setenv("STABLEGRAD_FAST", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # it compiles much and runs little
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()  # raises the error of a cell that fails
