"""Pages that need nothing else: one sheet (sheet.html) with style and language switch, and what each fills in."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template


def sheet(name: str) -> Template:
    """The page `name` ("neaptide.demo/page.html"), which extends "neaptide.simulate/sheet.html". Values are escaped."""
    return Environment(autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(_read)).get_template(name)


def _read(name: str) -> str:
    package, _, file = name.partition("/")
    return files(package).joinpath(file).read_text("utf-8")
