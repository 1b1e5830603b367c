"""What is built from this repository, and what it needs before it says a word."""

import configparser
import email
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vlmbatch

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

HEAVY = ("torch", "ray", "transformers", "pyarrow", "vllm", "datasets", "numpy", "pandas")

# Runs the console script's function with the heavy libraries made impossible to import.
HELP_WITHOUT_HEAVY = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(f"--help imports {{name}}")

sys.meta_path.insert(0, Blocked())
import vlmbatch
print(vlmbatch.__file__, file=sys.stderr)
from vlmbatch.cli import main
sys.argv = ["vlmbatch", "--help"]
main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the working tree, unpacked; built from a copy, which leaves no build/ behind."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    shutil.copytree(ROOT / "vlmbatch", source / "vlmbatch", ignore=_no_bytecode)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=_no_bytecode)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = "-m pip wheel . --no-deps --no-build-isolation --no-index --wheel-dir"
    built = subprocess.run(
        [sys.executable, *command.split(), str(folder)], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    [file] = folder.glob("vlmbatch-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "wheel")
    return folder / "wheel"


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    packed = {str(p.relative_to(wheel)) for p in wheel.rglob("*") if p.is_file()}
    info = {name for name in packed if name.startswith(_info(wheel).name + "/")}
    source = wheel.parent / "source"
    package = {
        str(path.relative_to(source)) for path in (source / "vlmbatch").rglob("*") if path.is_file()
    }
    assert packed - info == package
    assert "vlmbatch/py.typed" in packed
    assert any(name.endswith("/licenses/LICENSE") for name in info)


def test_the_wheel_says_who_it_is(wheel: Path) -> None:
    metadata = _metadata(wheel)
    assert metadata["Name"] == "vlmbatch"
    assert metadata["Version"] == vlmbatch.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    scripts = configparser.ConfigParser()
    scripts.read(_info(wheel) / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"vlmbatch": "vlmbatch.cli:main"}


def test_without_extras_the_wheel_asks_for_no_engine(wheel: Path) -> None:
    required = map(Requirement, _metadata(wheel).get_all("Requires-Dist", []))
    names = {r.name for r in required if not r.marker or r.marker.evaluate({"extra": ""})}
    assert "ray" in names
    assert not names & {"torch", "torchvision", "transformers", "vllm", "datasets", "numpy"}


def test_help_from_the_wheel_imports_nothing_heavy(wheel: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_HEAVY],
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(wheel) in done.stderr
    assert "Usage:" in done.stdout
    assert "run" in done.stdout


def test_constraints_pin_everything_that_make_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    pinned = {canonicalize_name(pin.partition("==")[0]): pin.partition("==")[2] for pin in pins}
    for requirement in _installed_by_make():
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} is pinned to {version}"


def test_ci_has_the_transformers_extra_without_torchvision() -> None:
    """See pyproject.toml: torchvision's builds must match torch's; num2words goes with it."""
    extras = PROJECT["optional-dependencies"]
    left_out = {"torchvision", "num2words"}
    engine = {r for r in extras["transformers"] if Requirement(r).name not in left_out}
    assert engine < set(extras["demo"])


def _installed_by_make() -> Iterator[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return map(Requirement, [*PROJECT["dependencies"], *extras["demo"], *extras["dev"]])


def _metadata(wheel: Path) -> Message:
    return email.message_from_string((_info(wheel) / "METADATA").read_text())


def _info(wheel: Path) -> Path:
    [folder] = wheel.glob("*.dist-info")
    return folder


def _no_bytecode(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__"]
