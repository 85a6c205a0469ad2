"""Prints the completion of ``seqarch`` for a shell: commands, options, and the choices and keys of configurations.

    eval "$(seqarch completion bash)"                       # in ~/.bashrc
    eval "$(seqarch completion zsh)"                        # in ~/.zshrc, after compinit

What is printed holds all words, so that completing starts no Python. Print it again when seqarch is updated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping

from experiments.__main__ import COMMANDS
from experiments.config.reference import groups, sections, task_keys
from experiments.tasks import TASKS
from experiments.util.output import exit_code
from experiments.util.program import program

WITH_KEYS = ("run", "search")
"""The commands that take ``KEY=VALUE``."""

BASH = r"""
_seqarch() {
    local cur="${COMP_LINE:0:COMP_POINT}" words part
    cur="${cur##* }"
    if (( COMP_CWORD == 1 )); then
        words=$_seqarch_commands
    elif [[ $cur == *=* && " $_seqarch_with_keys " == *" ${COMP_WORDS[1]} "* ]]; then
        local key="${cur%%=*}" before="${cur%"${cur##*[=,]}"}"
        words="$(compgen -P "$before" -W "${_seqarch_values[$key]}" -- "${cur##*[=,]}")"
        part="${cur%"${cur##*=}"}"
    else
        words=${_seqarch_words[${COMP_WORDS[1]}]}
        if [[ " $_seqarch_with_keys " == *" ${COMP_WORDS[1]} "* ]]; then words+=" $_seqarch_keys"; fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    # Where = separates words, only what comes after it is replaced.
    if [[ $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"$part"}"); fi
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace 2> /dev/null; fi
}
complete -o default -F _seqarch seqarch
""".lstrip()

ZSH = r"""
_seqarch() {
    local cur=${words[CURRENT]} command=${words[2]} found=0
    if (( CURRENT == 2 )); then
        compadd -- ${=_seqarch_commands}
    elif [[ $cur == *=* && " $_seqarch_with_keys " == *" $command "* ]]; then
        local key=${cur%%=*}
        compset -P '*[=,]'
        compadd -- ${=_seqarch_values[$key]} || _files
    else
        compadd -- ${=_seqarch_words[$command]} && found=1
        if [[ " $_seqarch_with_keys " == *" $command "* ]]; then compadd -S '' -- ${=_seqarch_keys} && found=1; fi
        (( found )) || _files
    fi
}
compdef _seqarch seqarch
""".lstrip()

SHELLS = {"bash": BASH, "zsh": ZSH}


def script(shell: str) -> str:
    """The words as variables of the shell, and the function that chooses among them."""
    every = [key for keys in sections().values() for key in keys] + [key for task in TASKS for key in task_keys(task)]
    values = {key.name: key.choices for key in every if key.choices} | groups()
    names = dict.fromkeys([*groups(), *(key.name for key in every if "[" not in key.name)])
    lines = [
        f"_seqarch_commands='{' '.join(COMMANDS)}'",
        f"_seqarch_with_keys='{' '.join(WITH_KEYS)}'",
        f"_seqarch_keys='{' '.join(f'{name}=' for name in names)}'",
        _table("_seqarch_words", {name: [*command.words.split(), "--help"] for name, command in COMMANDS.items()}),
        _table("_seqarch_values", values),
    ]
    return "\n".join(lines) + "\n" + SHELLS[shell]


def _table(name: str, words: Mapping[str, Iterable[str]]) -> str:
    rows = (f"    [{key}]='{' '.join(dict.fromkeys(each))}'" for key, each in words.items())
    return "\n".join([f"typeset -gA {name}", f"{name}=(", *rows, ")"])


def main() -> int:
    description, _, example = (__doc__ or "").partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        program("completion"), description=description, epilog=example, formatter_class=form
    )
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args().shell
    return exit_code(lambda: print(script(shell), end="") or 0)


if __name__ == "__main__":
    sys.exit(main())
