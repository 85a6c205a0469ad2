"""The tutorials: notebooks without outputs that run from the first cell to the last, and are pages of the site."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from docs.site.notebooks import markdown
from tests.support.paths import ROOT

FOLDER = ROOT / "docs" / "tutorials"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_valid_and_has_no_outputs(name: str):
    book = nbformat.read(FOLDER / name, as_version=nbformat.NO_CONVERT)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert set(book.metadata) == {"kernelspec", "language_info"}
    assert book.cells[0].source.startswith("# ")
    for cell in book.cells:
        assert not cell.metadata
        assert cell.source.strip()
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), "clear the outputs before you commit"


def test_the_page_of_tutorials_links_to_each():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in text for name in NOTEBOOKS)


def test_a_notebook_becomes_a_page():
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\n[x](a.md)"),
        nbformat.v4.new_code_cell("a = '```'\n"),
        nbformat.v4.new_code_cell("!ls {a}"),
    ]
    text = nbformat.writes(nbformat.v4.new_notebook(cells=cells))
    assert markdown(text) == "# Title\n\n[x](a.md)\n\n````python\na = '```'\n````\n\n```sh\n!ls {a}\n```\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In an empty folder. It says nothing on stderr, as warnings are no part of a tutorial, and prints plain lines."""
    for variable, folder in (("TMPDIR", tmp_path), ("IPYTHONDIR", tmp_path / "ipython"), ("JUPYTER_PATH", sys.prefix)):
        monkeypatch.setenv(variable, str(folder))
    book = nbformat.read(FOLDER / name, as_version=4)
    NotebookClient(book, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert not [output.text for output in outputs if "\x1b" in output.get("text", "")]
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert figures == sum("plt.show()" in cell.source for cell in book.cells)
