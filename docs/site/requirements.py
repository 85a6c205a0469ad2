"""The packages of an extra of pyproject.toml, a line each: ``python -m docs.site.requirements site``.

So that pip installs these alone, and does not build the package again.
"""

from __future__ import annotations

import argparse
import tomllib

from experiments.util.paths import ROOT


def requirements(extra: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"][extra]


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m docs.site.requirements")
    parser.add_argument("extra", help="the extra's name")
    print(*requirements(parser.parse_args().extra), sep="\n")
