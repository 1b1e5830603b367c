"""Commands for the first run and the nightly ones: init, schedule."""

from __future__ import annotations

import click

from vlmbatch.cli.program import clean_errors
from vlmbatch.schedule import TARGETS


@click.command()
@click.argument("manifest", nargs=-1, required=True)
@click.option("-o", "--output", default="job.yaml", help="The file to write. Default: job.yaml.")
@click.option("-m", "--model", help="As for run.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@clean_errors
def init(manifest: tuple[str, ...], output: str, model: str | None, overwrite: bool) -> None:
    """Write a commented job spec for MANIFEST, which is looked at.

    It has the tasks that the manifest's columns and the model fit, and runs as it is.
    """
    from vlmbatch.starter import write_spec

    started = write_spec(manifest, output, model=model, overwrite=overwrite)
    click.echo(started.as_text())


@click.command()
@click.argument("job")
@click.option("--for", "target", type=click.Choice(TARGETS), required=True, help="What starts it.")
@click.option("--at", default="02:30", help="When, in the spec's time zone. Default: 02:30.")
@click.option(
    "--image",
    metavar="IMAGE",
    help="Your container image (kubernetes, kuberay). Default: a stand-in.",
)
@clean_errors
def schedule(job: str, target: str, at: str, image: str | None) -> None:
    """Print what starts the job spec JOB every night, from the current folder.

    \b
    cron         a crontab line              systemd    a service and a timer
    kubernetes   a CronJob                   kuberay    a RayJob
    slurm        a batch script              airflow    a DAG
    actions      a workflow of GitHub Actions
    """
    from vlmbatch.schedule.nightly import IMAGE
    from vlmbatch.schedule.nightly import schedule as schedule_for

    click.echo(schedule_for(job, target, at=at, image=image or IMAGE), nl=False)
