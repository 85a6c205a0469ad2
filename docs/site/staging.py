"""The sources of the site: pages of docs/ where Sphinx reads them, and those that are generated from the library."""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from docs.site import api, matrices
from docs.site.chooser.measured import measured
from docs.site.links import Site, anchor, rewritten, sections
from docs.site.mixer_pages import layer_page, operation_page
from docs.site.notebooks import markdown
from docs.tables import operation_table
from experiments.util.paths import ROOT
from seqarch.layers import CHANNEL_MIXERS, MIXERS
from seqarch.ops import OPS

PAGES = Path("docs/site/pages")
OWN = ("index", "start", "chooser")
NAVIGATION: dict[str, tuple[str, ...]] = {
    "Begin": ("start", "tutorials/index", "chooser", "choosing", "explore"),
    "Use": ("guide", "models", "conversion", "decoding", "federated", "tasks", "matching", "runner", "cluster"),
    "Reference": ("mixers", "ops/index", "api/index"),
    "Measured": ("results/index", "bench"),
    "The house": ("architecture", "extending", "own_mixer", "contributing", "adr/index", "log", "changelog"),
}
ORPHAN = "---\norphan: true\n---\n\n"
"""What begins a page that is in no list of the navigation."""

_README = re.compile(r"<!-- README\.md: (.+?) -->")
_LAYERS = re.compile(r"<!-- generated: layers -->.*?<!-- end -->", re.DOTALL)


def site(root: Path = ROOT) -> Site:
    """Where each page of the repository is on the site."""
    pages = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
    pages |= {f"examples/{name}/README.md": f"{name}.md" for name in ("own_mixer", "federated")}
    for folder in ("docs", "docs/ops", "docs/adr", "docs/results", "docs/tutorials"):
        for path in sorted((root / folder).glob("*.md")):
            name = path.relative_to(root).as_posix()
            pages[name] = name.removeprefix("docs/").replace("README.md", "index.md")
    for path in sorted((root / "docs" / "tutorials").glob("*.ipynb")):
        pages[path.relative_to(root).as_posix()] = f"tutorials/{path.stem}.md"
    pages |= {f"{PAGES}/{name}.md": f"{name}.md" for name in OWN}
    pages |= {"docs/adr/index.md": "adr/index.md", "docs/ops/index.md": "ops/index.md"}
    layers = {("docs/mixers.md", name): (f"mixers/{name}.md", "") for name in (*MIXERS, *CHANNEL_MIXERS)}
    return Site(root, pages, layers | _sections_of_readme(root, pages))


def _sections_of_readme(root: Path, pages: dict[str, str]) -> dict[tuple[str, str], tuple[str, str]]:
    found = {}
    for own in OWN:
        for title in _README.findall((root / PAGES / f"{own}.md").read_text(encoding="utf-8")):
            found["README.md", anchor(title)] = (pages[f"{PAGES}/{own}.md"], anchor(title))
    return found


def stage(folder: Path, explorer: bool, root: Path = ROOT) -> None:
    """Write the sources of the site into an empty folder.

    Raises:
        BrokenLink: a link of a page leads nowhere.
        ValueError: a section of README.md is on no page.
    """
    there = site(root)
    arms = measured(root / "docs" / "results")["arms"]
    made: dict[str, str] = {}
    for page, placed in there.pages.items():
        if (root / page).is_file() and page != "README.md":
            made[placed] = _page(page, placed, there)
    shown = matrices.draw(folder / "mixers" / "matrices")
    for name in (*MIXERS, *CHANNEL_MIXERS):
        placed = f"mixers/{name}.md"
        own = [arm for arm in arms if arm["pattern"] == name]
        made[placed] = rewritten(layer_page(name, shown.get(name, ""), own), "docs/mixers.md", placed, there)
    for name in OPS:
        made[f"ops/{name}.md"] = rewritten(operation_page(name), f"docs/ops/{name}.md", f"ops/{name}.md", there)
    made["adr/index.md"] = _decisions(root)
    made["ops/index.md"] = _operations(there)
    made |= api.pages()
    if explorer:
        made["explore.md"] = (root / PAGES / "explore.md").read_text(encoding="utf-8")
    for listed in ("results", "tutorials"):
        made[f"{listed}/index.md"] += "\n\n" + toctree(_below(listed, made), hidden=True)
    made["index.md"] += "\n\n" + "\n\n".join(_navigation(made))
    made |= _files(there, folder)
    for placed, text in made.items():
        (folder / placed).parent.mkdir(parents=True, exist_ok=True)
        (folder / placed).write_text(text, encoding="utf-8")
    shutil.copy(root / PAGES / "chooser.html", folder)


def _page(page: str, placed: str, there: Site) -> str:
    text = (there.root / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        return rewritten(markdown(text), page, placed, there) + _of_notebook(page, placed, there)
    if page.startswith("docs/adr/"):  # a long list, which adr/index.md has and the navigation does not
        text = ORPHAN + text
    if page == "docs/mixers.md":
        text = _LAYERS.sub(_layer_lists(), text)
    parts = _README.split(text)
    written = [rewritten(part, page, placed, there) for part in parts]
    readme = sections((there.root / "README.md").read_text(encoding="utf-8"))
    for i in range(1, len(parts), 2):
        if parts[i] not in readme:
            raise ValueError(f"{page} takes the section {parts[i]!r} of README.md, which has none of that name")
        written[i] = rewritten(readme[parts[i]], "README.md", placed, there)
    return "".join(written)


def _of_notebook(page: str, placed: str, there: Site) -> str:
    """What a page says of the notebook that it was made of, which comes along."""
    there.files[page] = f"files/{page}"
    where = posixpath.relpath(there.files[page], posixpath.dirname(placed))
    return f"\n---\n\nThis page is [a notebook]({where}), shown without outputs: run it to see yours.\n"


def _layer_lists() -> str:
    parts = []
    for title, registry in (("Mixers", MIXERS), ("Channel mixers", CHANNEL_MIXERS)):
        parts += [f"## {title}", toctree([f"mixers/{name}" for name in registry])]
    return "\n\n".join(parts)


def toctree(pages: list[str], hidden: bool = False, caption: str = "") -> str:
    options = [f":caption: {caption}"] * bool(caption) + [":hidden:"] * hidden + [":maxdepth: 1"]
    return "\n".join(("```{toctree}", *options, "", *pages, "```"))


def _navigation(made: dict[str, str]) -> Iterator[str]:
    for caption, pages in NAVIGATION.items():
        there = [page for page in pages if any(f"{page}{suffix}" in made for suffix in (".md", ".rst"))]
        yield toctree(there, hidden=True, caption=caption)


def _below(folder: str, made: dict[str, str]) -> list[str]:
    names = sorted(path for path in made if path.startswith(f"{folder}/") and path != f"{folder}/index.md")
    return [Path(name).stem for name in names]


def _decisions(root: Path) -> str:
    """The list of the decision records."""
    said = "Why things are as they are: a record for each decision, in order."
    records = sorted((root / "docs" / "adr").glob("[0-9]*.md"))
    titles = {record.name: record.read_text(encoding="utf-8").splitlines()[0].strip("# ") for record in records}
    listed = "\n".join(f"- [{title}]({name})" for name, title in titles.items())
    return f"# Decisions\n\n{said}\n\n{listed}\n"


def _operations(there: Site) -> str:
    table = rewritten(operation_table(), "README.md", "ops/index.md", there)
    said = "Pure functions on tensors: each has a plain reference, and backends that must agree with it, by test."
    return f"# Operations\n\n{said}\n\n{table}\n\n{toctree(list(OPS), hidden=True)}\n"


def _files(there: Site, folder: Path) -> dict[str, str]:
    """Copy the files that pages link to; the pages that show those which are source."""
    made = {}
    for path, placed in there.files.items():
        copy = folder / "files" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(there.root / path, copy)
        if placed.endswith(".md"):
            shown = f"```{{literalinclude}} {copy.name}\n:linenos:\n```"
            made[placed] = f"{ORPHAN}# {path}\n\n{shown}\n"
    return made
