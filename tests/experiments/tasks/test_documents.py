"""From the files of packages to documents of plain bytes."""

from __future__ import annotations

import gzip

import pytest

from experiments.tasks.documents import LONGEST, html, pieces, plain, sequences

PAGE = b"""<html><head><title>One &amp; two</title><style>p { color: red }</style><script>var a = "<p>";</script></head>
<body><h1>A   heading</h1><p>Some <b>bold</b>
 words&nbsp;and caf&#233;.</p><ul><li>first<li>second</ul><pre>def f():
    return 1</pre>after<br>wards</body></html>"""


def test_html_becomes_lines_of_text():
    ((name, text),) = html("a/b.html", PAGE)
    assert name == "a/b.txt"
    lines = ["One & two", "A heading", "Some bold words and café.", "first", "second"]
    assert text.decode().splitlines() == [*lines, "def f():", "    return 1", "after", "wards"]


def test_files_are_unpacked_by_their_names():
    assert list(plain("a.txt", b"as it is")) == [("a.txt", b"as it is")]
    assert list(plain("a.txt.gz", gzip.compress(b"packed"))) == [("a.txt", b"packed")]
    with pytest.raises(ValueError, match=r"a\.gz is named \.gz and cannot be unpacked"):
        list(plain("a.gz", b"not packed"))


def test_a_giant_file_is_cut_at_ends_of_lines():
    content = b"".join(b"%d and some words\n" % number for number in range(20_000))
    found = dict(pieces("a.mm", content))
    assert list(found) == [f"a.mm/{number:04}" for number in range(len(found))]
    assert b"".join(found.values()) == content
    assert all(piece.endswith(b"\n") for piece in found.values())
    assert all(LONGEST <= len(piece) < LONGEST + 30 for piece in list(found.values())[:-1])
    assert dict(pieces("b", b"x" * (2 * LONGEST))) == {"b/0000": b"x" * (2 * LONGEST)}


def test_sequences_lose_headers_and_line_ends():
    long = b"ACGT" * (LONGEST // 4) + b"GG"
    text = b">chr 1:x\nACG\nTNA\n>chr2\n" + b"\n".join(long[i : i + 60] for i in range(0, len(long), 60)) + b"\n"
    found = dict(sequences("g.fasta.gz", gzip.compress(text)))
    assert found["g.fasta/chr_1_x/0000"] == b"ACGTNA"
    assert (found["g.fasta/chr2/0000"], found["g.fasta/chr2/0001"]) == (long[:LONGEST], b"GG")
