"""Writes the command reference of README.md from the program's own help.

python -m tests.write_reference
"""

from inspect import cleandoc
from pathlib import Path

import click

from vlmbatch.cli import main

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- reference: begin -->\n", "<!-- reference: end -->"
WIDTH = 100
SAME = 10
"""A command that has more options of `run` than these is shown without them."""


def reference() -> str:
    """The help of every command, as Markdown."""
    pages = []
    of_run = {(each.name, getattr(each, "help", "")) for each in main.commands["run"].params}
    program = click.Context(main, info_name="vlmbatch", **main.context_settings)
    for name, command in main.commands.items():
        same = [p for p in command.params if (p.name, getattr(p, "help", "")) in of_run]
        if name != "run" and len(same) > SAME:
            own = [p for p in command.params if p not in same or isinstance(p, click.Argument)]
            about = f"{cleandoc(command.help or '')}\n\nIts options are those of `run`, and:"
            command = click.Command(name, params=own, help=about)
        context = click.Context(
            command, program, name, max_content_width=WIDTH, terminal_width=WIDTH
        )
        pages.append(f"```\n{command.get_help(context)}\n```\n")
    return "\n".join(pages)


def with_reference(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{reference()}{END}{after}"


if __name__ == "__main__":
    README.write_text(with_reference(README.read_text()))
