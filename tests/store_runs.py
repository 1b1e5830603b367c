"""Runs whose images, manifest and output are objects of one store, killed and looked at."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from tests.harness import (
    OURS,
    Finished,
    KillRun,
    Kind,
    Quiz,
    assert_adds_up,
    echo,
    kill_points,
    picture,
)


class ObjectServer(Protocol):
    """``scheme``: what addresses of its objects begin with."""

    scheme: str

    def new_bucket(self) -> str: ...
    def fs(self) -> Any: ...


@dataclass(frozen=True)
class Pictures:
    """Images on a server, row by row; runs may share them."""

    server: ObjectServer
    bucket: str
    count: int

    @classmethod
    def made(cls, server: ObjectServer, count: int) -> Pictures:
        """In a bucket of their own."""
        pictures, small = cls(server, server.new_bucket(), count), picture()
        names = [f"{pictures.bucket}/images/{row:05d}.png" for row in range(count)]
        server.fs().pipe(dict.fromkeys(names, small))
        return pictures

    @property
    def root(self) -> str:
        return f"{self.server.scheme}://{self.bucket}"

    def write_manifest(self, made: Quiz) -> str:
        """The address of a quiz in row groups of 50; each row names an image of its own, relative
        to the manifest or by its whole address."""
        names = [f"images/{row:05d}.png" for row in range(made.rows)]
        rows = range(made.rows)
        columns = {
            "image": [f"{self.root}/{names[i]}" if i % 2 else names[i] for i in rows],
            "id": made.ids,
            "questions": [[f"{i}.{j}?" for j in range(len(made.answers[i]))] for i in rows],
            "answers": made.answers,
        }
        pq.write_table(pa.table(columns), made.path, row_group_size=50)
        name = f"{self.bucket}/quiz-{made.rows}.parquet"
        self.server.fs().put_file(str(made.path), name)
        return f"{self.server.scheme}://{name}"


class StoreRun(KillRun):
    """A quiz whose images, manifest and output are on the server; ``output`` is a copy of it."""

    _numbers = itertools.count(1)

    def __init__(self, folder: Path, pictures: Pictures, rows: int) -> None:
        self.server = pictures.server
        self.prefix = f"{pictures.bucket}/out-{next(self._numbers)}"
        self.place = f"{self.server.scheme}://{self.prefix}"
        super().__init__(folder, Quiz(folder / "quiz.parquet", rows))
        self._options = [
            *(pictures.write_manifest(self.quiz), "-t", "vqa", f"--output={self.place}"),
            *echo(reply_from="answers", log=self.log.path, delay=0.01, capacity=4),
            *("--part-rows=64", "--executor=local", "--json"),
        ]

    def shards(self) -> list[str]:
        found: list[str] = self.server.fs().find(f"{self.prefix}/{OURS}/shards")
        return found

    def fetch_output(self) -> Path:
        """The output as it is now, beside the proxy; shards before the parts that they may go into
        meanwhile."""
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir()
        fs = self.server.fs()
        for place in (f"{self.prefix}/{OURS}", self.prefix):
            for path in fs.find(place):
                local = self.output / path.removeprefix(f"{self.prefix}/")
                if local.exists():
                    continue
                with contextlib.suppress(FileNotFoundError):
                    data = fs.cat_file(path)
                    local.parent.mkdir(parents=True, exist_ok=True)
                    local.write_bytes(data)
        return self.output

    def _committed(self) -> set[int]:
        self.fetch_output()
        return super()._committed()

    def assert_kept(self) -> None:
        self.fetch_output()
        super().assert_kept()
        assert not (self.output / OURS / "lock").exists()

    def assert_done(self, ended: Finished) -> None:
        assert ended.exit_code == 0, ended
        assert_adds_up(ended.json)
        assert ended.json["failed"] == 0
        self.assert_kept()


def kill_and_finish(run: StoreRun, kind: Kind, *, count: int, seed: int) -> None:
    answers = sum(map(len, run.quiz.answers)) // 2 // count - 30  # 2 workers; see KillPoint.most
    points = kill_points(kind, count, seed=seed, answers=answers)
    if kind == "worker":
        ended = run.kill_workers(points)
        assert ended.json["worker_deaths"] == count
    else:
        for point in points:
            run.kill(point)
        ended = run.finish()
    run.assert_done(ended)
