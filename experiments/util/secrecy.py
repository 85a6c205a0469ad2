"""Keeps passwords, keys and tokens out of what is recorded, as far as a name or a form shows that they are such.

No rule finds every secret: one under a name like any other is recorded as it is given. The place for
secrets is the environment, of which a record holds a few known variables only.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

MASK = "***"

NAME = re.compile(
    r"(?:^|[._+-])(?:pass(?:word|wd|phrase)?|pwd|secrets?|token|credentials?|auth|bearer"
    r"|(?:api|access|private|secret|auth|account|encryption|signing)[._-]?keys?)$",
    re.IGNORECASE,
)
"""The end of a key whose value is a secret: ``wandb.api_key``, ``HF_TOKEN``, ``--password``, ``access_token``."""

HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
"""The place in ``accessToken`` where an underscore would be."""


FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic, Stripe
    r"|hf_[A-Za-z0-9]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|npm_[A-Za-z0-9]{16,}|pypi-[\w-]{16,}|wandb_v\d_\w{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
)
"""Values that are keys by their form, whatever they are called: of model hubs, code hosts and clouds."""

IN_ADDRESS = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]+(?=@)")
"""The user and password in ``https://user:password@host``."""

PLAIN = re.compile(r"[-+.\deE]*|true|false|null|none", re.IGNORECASE)
"""Numbers and the like, as ``model.pad_token=3``: no secrets."""


def masked_text(text: str) -> str:
    """A text with what has the form of a secret masked."""
    return IN_ADDRESS.sub(MASK, FORMS.sub(MASK, text))


def masked(value: Any) -> Any:
    """Nested mappings and lists with their secrets masked, by name and by form."""
    if isinstance(value, Mapping):
        return {key: MASK if _is_secret(key, inner) else masked(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(inner) for inner in value]
    return masked_text(value) if isinstance(value, str) else value


def masked_command(command: str) -> str:
    """A command line, as a shell takes it, with the values of ``key=secret`` and ``--key secret`` masked."""
    try:
        words = shlex.split(command)
    except ValueError:  # Of a variable that somebody set to something else.
        return masked_text(command)
    shown, before = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals and _is_secret(name, value):
            word = f"{name}={MASK}"
        elif before.startswith("--") and "=" not in before and _is_secret(before, word):
            word = MASK
        shown.append(masked_text(word))
        before = word
    return shlex.join(shown)


def _is_secret(name: object, value: object) -> bool:
    named = NAME.search(HUMP.sub("_", str(name))) is not None
    return named and isinstance(value, str) and PLAIN.fullmatch(value) is None
