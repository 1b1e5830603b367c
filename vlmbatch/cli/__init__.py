"""The command line. Thin: options become a JobSpec; everything heavy is imported by the command."""

from __future__ import annotations

import click

from vlmbatch import __version__
from vlmbatch.cli.exporting import export, import_batch
from vlmbatch.cli.looking import doctor, evaluate, models, quality, status
from vlmbatch.cli.program import Program
from vlmbatch.cli.running import plan, reparse, retry, run
from vlmbatch.cli.starting import init, schedule


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vlmbatch")
def main() -> None:
    """Ask a vision-language model something about every image of a dataset.

    \b
    vlmbatch plan manifest.parquet --task caption    (asks nothing, writes nothing)
    vlmbatch run manifest.parquet --task caption     (again: it resumes)
    vlmbatch status OUTPUT                           (also of many: the folder above)
    vlmbatch retry OUTPUT
    vlmbatch reparse OUTPUT
    vlmbatch quality OUTPUT                          (are the answers any good?)
    """


for each in (
    *(run, plan, doctor, retry, reparse, status, quality, models),
    *(export, import_batch, evaluate, init, schedule),
):
    main.add_command(each)
