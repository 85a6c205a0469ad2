"""How the pages of docs become those of the site: links, sections, equations, and what is wrong with built pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.site import staging
from docs.site.check import problems
from docs.site.links import BrokenLink, Site, rewritten, sections
from docs.site.mixer_pages import equations, layer_page, rendered
from docs.site.notation import latex
from seqarch.layers import MIXERS
from tests.support.paths import ROOT

WITHOUT_EQUATION = {"big_bird", "longformer", "moba", "sliding_window"}
"""Mixers whose first sentence has words alone."""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    for name in ("README.md", "docs/guide.md", "docs/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text", encoding="utf-8")
    pages = {"README.md": "index.md", "docs/guide.md": "guide.md", "docs/adr/README.md": "adr/index.md"}
    return Site(tmp_path, pages, {("README.md", "installing"): ("start.md", "installing")})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[`guide`](guide.md#b)", "[`guide`](../guide.md#b)"),
        ("[x](../README.md#installing), [y](../README.md#else)", "[x](../start.md#installing), [y](../index.md#else)"),
        ("[![alt](a.py)](guide.md)", "[![alt](../files/docs/a.py.md)](../guide.md)"),
        ("[z](adr/) [w](https://example.org/a)", "[z](../adr/index.md) [w](https://example.org/a)"),
        ("`a[i](b)`\n```\n[x](nowhere.md)\n```\n", "`a[i](b)`\n```\n[x](nowhere.md)\n```\n"),
    ],
)
def test_links_lead_to_the_same_from_another_place(site: Site, text: str, expected: str):
    assert rewritten(text, "docs/here.md", "deep/here.md", site) == expected


def test_a_link_that_leads_nowhere_is_an_error_that_names_it(site: Site):
    with pytest.raises(BrokenLink, match=r"docs/here\.md links to nowhere\.md"):
        rewritten("[x](nowhere.md)", "docs/here.md", "here.md", site)


def test_every_page_of_the_repository_is_staged_with_its_links():
    there = staging.site()
    for page, placed in there.pages.items():
        if (ROOT / page).is_file() and page != "README.md":
            assert staging._page(page, placed, there)
    for name in ("gla", "moe"):
        assert "## Options" in rewritten(layer_page(name), "docs/mixers.md", f"mixers/{name}.md", there)
    navigated = {name for names in staging.NAVIGATION.values() for name in names}
    top = {Path(placed).stem for placed in there.pages.values() if "/" not in placed}
    assert top - navigated == {"index"}


def test_sections_are_told_by_headings_and_not_by_code():
    text = "before\n## One\n```sh\n## no heading\n```\n### Below\n## Two\nend\n"
    assert sections(text) == {"": "before\n", "One": text[7 : text.index("## Two")], "Two": "## Two\nend\n"}


@pytest.mark.parametrize("name", MIXERS)
def test_the_equation_of_a_mixer_is_read_as_one(name: str):
    assert bool(equations(MIXERS[name].__doc__ or "")) == (name not in WITHOUT_EQUATION)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("S_t = a_t S_{t-1} + k_t^T v_t", r"S_{t} = a_{t} S_{t - 1} + k_{t}^{\top} v_{t}"),
        ("q^I_th = sqrt(1 - a^2)", r"q_{th}^{I} = \sqrt{1 - a^{2}}"),
        ("y = sum over the top k", None),
        ("x_a_b = 1", None),
        ("y = f(x", None),
        ("y = `", None),
    ],
)
def test_plain_letters_are_read_as_an_equation_or_not_at_all(text: str, expected: str | None):
    assert latex(text) == expected


def test_code_that_is_no_equation_stays_code():
    assert rendered("`a = b` and `top_k = 3` and `a`") == "{math}`a = b` and `top_k = 3` and `a`"


def test_what_is_wrong_with_built_pages_is_said(tmp_path: Path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there"></a><a href="b.html#gone"></a><a href="c.html"></a><a href="#"></a>'
        '<script src="https://example.org/x.js"></script><img src="no.png"><img src="data:,">',
        encoding="utf-8",
    )
    (tmp_path / "b.html").write_text('<p id="there">' + "x" * 1_000_000, encoding="utf-8")
    said = "\n".join(problems(tmp_path))
    assert len(said.splitlines()) == 5
    for part in ("b.html#gone", "c.html", "https://example.org/x.js", "no.png", "b.html and what it loads are 1,000,0"):
        assert part in said
