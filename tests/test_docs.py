"""The docs say what the program says; every command and option has help."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from tests.write_reference import README, with_reference
from vlmbatch.cli import main
from vlmbatch.job import JobSpec, spec_from
from vlmbatch.records import TaskKind
from vlmbatch.tasks import make_task

ROOT = README.parent
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


def test_the_reference_in_the_readme_is_current() -> None:
    readme = README.read_text()
    assert with_reference(readme) == readme, "run `make reference`"


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_and_option_has_help(name: str) -> None:
    command = main.commands[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_every_option_that_the_readme_names_exists() -> None:
    known = {"--version", "--help", "--write"}
    for command in main.commands.values():
        for parameter in command.params:
            known.update(parameter.opts)
    prose = README.read_text().split("<!-- reference: begin -->")[0]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose))
    assert named - known - {"--strict"} == set()


def test_help_fits_a_terminal() -> None:
    result = CliRunner().invoke(main, ["run", "--help"])
    assert result.exit_code == 0, result.output
    assert "MANIFEST" in result.output


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_each_job_that_users_copy_is_valid(path: Path) -> None:
    spec = spec_from(yaml.safe_load(path.read_text()), where=path.name)
    assert isinstance(spec, JobSpec)
    assert spec.model is not None
    assert spec.output is not None
    assert all(make_task(task).kind in TaskKind for task in spec.tasks)


def test_there_are_jobs_to_copy() -> None:
    assert JOBS


def test_python_dash_m_is_the_same_program() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "vlmbatch", "--version"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.startswith("vlmbatch, version ")
