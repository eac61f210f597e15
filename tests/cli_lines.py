"""Reads `neaptide ...` command lines out of texts and holds them against the command line that exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click

from neaptide.cli import build


def lines(text: str) -> Iterator[str]:
    """Command lines that call neaptide, from code: each begins with the word itself, a path to it or a prompt. What
    stands in a ```text block is output."""
    text = re.sub(r"```text\n.*?```", "", text, flags=re.S)
    for line in text.replace("\\\n", " ").splitlines():
        code = line.strip().lstrip("$# ").strip()
        words = code.split()
        while words and "=" in words[0] and not words[0].startswith("-"):
            words = words[1:]  # NAME=value before the command
        if words and words[0].rsplit("/", 1)[-1] == "neaptide" and len(words) > 1:
            yield " ".join(["neaptide", *words[1:]])


def inline(text: str) -> Iterator[str]:
    """`neaptide ...` in running text. What stands for something the reader puts in is left out: DIR, NAME ..."""
    for span in re.findall(r"(?<!`)`(neaptide [^`\n]+)`(?!`)", text):
        words = span.split()
        yield " ".join(word for word in words if not (len(word) > 1 and word.isupper()) and word != "...")


def complaint(line: str) -> str:
    """Why this line is not a command of ours; "" when it is."""
    try:
        words = shlex.split(line, comments=True)[1:]
    except ValueError as error:
        return f"{line}: {error}"
    command: click.Command = build()
    context = click.Context(command, info_name="neaptide")
    for at, word in enumerate(words):
        if word in ("|", ">", "&&", ";", "2>&1"):
            break
        if word.startswith("-"):
            name = word.split("=", 1)[0]
            if name != "--help" and not any(name in p.opts + p.secondary_opts for p in command.params):
                return f"{line}: `{command.name}` has no option {name}"
        elif isinstance(command, click.Group):
            found = command.get_command(context, word)
            if found is None and not _is_value(command, words, at):
                return f"{line}: no command {word!r}"
            if found is not None:
                command, context = found, click.Context(found, info_name=word, parent=context)
    return ""


def _is_value(command: click.Command, words: list[str], at: int) -> bool:
    """Whether a word is the value of the option before it."""
    before = words[at - 1] if at else ""
    return any(before in p.opts and not getattr(p, "is_flag", False) for p in command.params)
