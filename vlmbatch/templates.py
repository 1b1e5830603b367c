"""The files that vlmbatch writes for people to change, as Jinja templates of this package.

Their marks are ``[[ value ]]`` and ``[% statement %]``: braces belong to what they write.
"""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("vlmbatch", "."),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        block_start_string="[%",
        block_end_string="%]",
        variable_start_string="[[",
        variable_end_string="]]",
        comment_start_string="[#",
        comment_end_string="#]",
    )


def template(name: str) -> Template:
    """The template of this name, without ``.jinja``."""
    return _environment().get_template(f"{name}.jinja")
