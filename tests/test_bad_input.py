"""Whatever the input, a row is answered or says why not, and a command says in one message, without
a traceback, what it found and what to do next."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.bad_images import broken_page, make_images
from tests.harness import PATIENCE
from vlmbatch.cli import main
from vlmbatch.records import Range, Result
from vlmbatch.results.files import write_part
from vlmbatch.results.ids import repeated_ids
from vlmbatch.results.output import Output
from vlmbatch.results.schema import RESULT_SCHEMA, to_batch
from vlmbatch.results.store import LocalStore

ECHO = ["--engine", "echo"]
CAPTION = ["-t", "caption", *ECHO]
ALL_MAY_FAIL = ["--max-failure-rate", "1"]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"exit code {self.exit_code}\n{self.stdout}\n{self.stderr}"


def vlmbatch(
    folder: Path,
    *args: str | Path | bytes,
    environment: Mapping[str, str | None] | None = None,
    shell: str = 'exec "$@"',
) -> Ended:
    """The command in ``folder``, in a process of its own, started by a line of shell (its words are
    "$@"). Checked in every case: no traceback. ``environment``: changes; None takes one away."""
    changed = {**os.environ, **(environment or {})}
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-m", "vlmbatch", *args],
        cwd=folder,
        env={key: value for key, value in changed.items() if value is not None},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
    )
    ended = Ended(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert "Traceback" not in ended.stdout + ended.stderr, str(ended)
    return ended


def table(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def texts(values: Sequence[bytes | None]) -> pa.Array:
    """A string column of these bytes, UTF-8 or not."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def results(output: Path) -> list[dict[str, Any]]:
    return [
        row for part in sorted(output.glob("*.parquet")) for row in pq.read_table(part).to_pylist()
    ]


def outcome(result: Mapping[str, Any]) -> str:
    return result["error"]["code"] if result["error"] else result["status"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good manifest of three rows, ``good.parquet``."""
    folder = tmp_path_factory.mktemp("bad input")
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    table(folder / "good.parquet", image=["a.png"] * 3, id=["1", "2", "3"], n=[1, 2, 3])
    return folder


# rows


def test_a_bad_image_fails_its_row_and_an_odd_one_does_not(tmp_path: Path) -> None:
    cases = make_images(tmp_path / "with spaces, 线 and é")
    manifest = table(tmp_path / "with spaces, 线 and é/m.parquet", image=[c.image for c in cases])
    ended = vlmbatch(tmp_path, "run", manifest, *CAPTION, "-o", "o", "--json", *ALL_MAY_FAIL)
    assert ended.exit_code == 0, str(ended)
    found = results(tmp_path / "o")
    assert [row["row"] for row in found] == list(range(len(cases)))
    for case, row in zip(cases, found, strict=True):
        message = (row["error"] or {"message": ""})["message"]
        assert (outcome(row), case.says in message) == (case.status, True), (case, message)
        assert "\n" not in message.replace("new\nline", "")
        if case.status == "ok":
            assert (row["image_width"], row["image_height"]) == case.size, case
    assert "s3cr3t" not in str(found)
    assert "secret" not in str(found)
    good = sum(case.status == "ok" for case in cases)
    summary = json.loads(ended.stdout)
    assert (summary["rows"], summary["ok"], summary["failed"]) == (
        len(cases),
        good,
        len(cases) - good,
    )


def test_a_question_that_is_no_question_fails_its_request_alone(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    png = (tmp_path / "a.png").read_bytes()
    asked: list[tuple[Any, Any, bytes | None, list[str]]] = [
        # images, questions, id, the outcome of each result
        ([{"bytes": png}], ["a"], b"same", ["ok"]),
        ([{"path": "a.png"}], ["a", "b"], b"same", ["ok", "ok"]),
        ([{"bytes": png}], [], b"same", ["bad_row"]),
        ([{"bytes": png}], None, b"1", ["bad_row"]),
        ([{"bytes": png}], ["a", None, ""], b"2", ["ok", "bad_row", "bad_row"]),
        ([{"bytes": png}], ["caf\udce9"], b"3", ["bad_row"]),  # no UTF-8
        ([{"bytes": png}], ["é线🎉 \0\n"], None, ["ok"]),
        ([{"bytes": png}], ["x" * 10_000_000], b"4", ["prompt_too_long"]),
        ([{"bytes": png}], ["a"], b"\xff", ["bad_row"]),
        ([], ["a", "b"], b"5", ["bad_row"]),
        (None, ["a"], b"6", ["bad_row"]),
        ([None], ["a"], b"7", ["bad_row"]),
        ([{"bytes": None}], ["a"], b"8", ["bad_row"]),
        ([{"bytes": png}, {"bytes": b"text"}], ["a"], b"9", ["image_unreadable"]),
    ]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    words = [q for _, questions, _, _ in asked for q in questions or ()]
    offsets = [0]
    for _, questions, _, _ in asked:
        offsets.append(offsets[-1] + len(questions or ()))
    missing = pa.array([questions is None for _, questions, _, _ in asked])
    encoded = [None if q is None else q.encode(errors="surrogateescape") for q in words]
    manifest = table(
        tmp_path / "m.parquet",
        image=pa.array([images for images, _, _, _ in asked], pa.list_(struct)),
        questions=pa.ListArray.from_arrays(offsets, texts(encoded), mask=missing),
        id=texts([identity for _, _, identity, _ in asked]),
    )
    ended = vlmbatch(tmp_path, "run", manifest, "-t", "vqa", *ECHO, "-o", "o", *ALL_MAY_FAIL)
    assert ended.exit_code == 0, str(ended)
    found = results(tmp_path / "o")
    for number, (_, _, _, expected) in enumerate(asked):
        assert [outcome(row) for row in found if row["row"] == number] == expected, number
    assert len(found) == sum(len(expected) for _, _, _, expected in asked)
    assert "column 'questions' is no UTF-8 text" in str(found)
    # ids: kept as they are, and one warning with their number
    assert [row["id"] for row in found if row["row"] < 3] == ["same"] * 4
    assert ended.stderr.count("Warning") == 1
    assert "Warning: 2 rows have the id of an earlier row" in ended.stderr


def test_a_template_fails_the_rows_that_it_does_not_fit(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    manifest = table(tmp_path / "m.parquet", image=["a.png"] * 5, n=[1, 0, None, 2, 3])
    template = "{{ 6 // n }}{{ 'x' * 2000000 if n == 2 }}{{ '\\ud800' if n == 3 }}"
    options = ["-t", "mine", "--prompt", template, *ECHO, "-o", "o", *ALL_MAY_FAIL]
    ended = vlmbatch(tmp_path, "run", manifest, *options)
    assert ended.exit_code == 0, str(ended)
    found = results(tmp_path / "o")
    assert [outcome(row) for row in found] == ["ok", "bad_row", "bad_row", "prompt_too_long", "ok"]
    assert "does not fit this row: integer division" in found[1]["error"]["message"]
    assert found[4]["question"] == "2?"  # half a surrogate pair fits into no file


def test_columns_of_any_type_are_carried(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    columns = {
        "day": pa.array([1, 4_000_000, None], pa.date32()),  # the second is the year 12921
        "at": pa.array([1, 2, None], pa.timestamp("us", "Europe/Paris")),
        "kind": pa.array(["a", "b", None]).dictionary_encode(),
        "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int32())),
        "nested": pa.array([{"a": [{"b": 1.5}]}, None, {"a": []}]),
        "view": pa.array(["x", "y", None], pa.string_view()),
        "nothing": pa.nulls(3),
    }
    table(tmp_path / "m.parquet", image=["a.png"] * 3, **columns)
    options = [*CAPTION, "--carry", "*", "-o", "o", *ALL_MAY_FAIL]
    ended = vlmbatch(tmp_path, "run", "m.parquet", *options)
    assert ended.exit_code == 0, str(ended)
    found = results(tmp_path / "o")
    assert [outcome(row) for row in found] == ["ok", "bad_row", "ok"]
    assert found[1]["error"]["message"] == "column 'day' date value out of range"
    kept = pq.read_table(tmp_path / "m.parquet").drop_columns(["image", "day"]).to_pylist()
    assert [{name: row[name] for name in kept[0]} for row in found] == kept


def test_rows_with_the_same_id_are_counted_once_each(tmp_path: Path) -> None:
    """Over parts, and whatever the number of their results."""
    store = LocalStore(tmp_path / "o")
    store.make()
    output = Output(store, "run", 3, RESULT_SCHEMA)
    for number, ids in enumerate([["a", "b", "a"], ["c", "a", "b"]]):
        made = [
            Result(row=3 * number + i, id=name, task="vqa", request=request)
            for i, name in enumerate(ids)
            for request in (0, 1)
        ]
        batch = to_batch(made, model="m", schema=RESULT_SCHEMA)
        rows = Range(3 * number, 3 * number + 3)
        write_part(
            store, number, iter([batch]), schema=RESULT_SCHEMA, run="run", epoch=1, rows=rows
        )
    assert repeated_ids(output) == 3
    assert repeated_ids(output, max_rows=4) == 1
    assert repeated_ids(Output(store, "other", 3, RESULT_SCHEMA)) == 0


# manifests


def test_no_rows_are_a_run_too(here: Path) -> None:
    table(here / "empty.parquet", image=pa.array([], pa.string()))
    for _ in range(2):
        ended = vlmbatch(here, "run", "empty.parquet", *CAPTION, "--json")
        assert ended.exit_code == 0, str(ended)
        summary = json.loads(ended.stdout)
        assert (summary["rows"], summary["failed"], summary["left"]) == (0, 0, 0)
        assert summary["warnings"] == ["the manifest has no rows: nothing was asked"]


def test_files_and_row_groups_without_rows_are_passed_over(here: Path) -> None:
    for number, rows in enumerate([0, 2, 0, 3, 0]):
        table(here / f"some/{number}.parquet", image=pa.array(["../a.png"] * rows, pa.string()))
    schema = pa.schema([("image", pa.string())])
    with pq.ParquetWriter(here / "some/9.parquet", schema) as writer:
        for rows in (0, 2, 0):
            writer.write_table(pa.table({"image": pa.array(["../a.png"] * rows, pa.string())}))
    ended = vlmbatch(here, "run", "some", *CAPTION, "--checkpoint-rows", "2")
    assert ended.exit_code == 0, str(ended)
    assert [(r["row"], r["status"]) for r in results(here / "some-caption")] == [
        (row, "ok") for row in range(7)
    ]


def test_a_broken_page_stops_the_run_at_its_row_and_keeps_those_before(here: Path) -> None:
    names = pa.table({"image": ["a.png"] * 300, "id": [str(i) for i in range(300)]})
    broken_page(names, here / "page.parquet", rows=100, group=2)
    ended = vlmbatch(here, "run", "page.parquet", *CAPTION, "--checkpoint-rows", "50")
    assert ended.exit_code == 1, str(ended)
    error = ended.stderr.partition("Error: ")[2]
    assert error.startswith(f"at row 200: cannot read {here}/page.parquet: "), str(ended)
    shards = sorted((here / "page-caption/__vlmbatch/shards").iterdir())
    assert [shard.name.split("-")[2:] for shard in shards][-1] == [
        "000000000150",
        "000000000199.arrow",
    ]


# commands


@dataclass(frozen=True)
class Refused:
    """A command that must not run, and what its one message must hold."""

    args: Sequence[str]
    says: Sequence[str]
    exit_code: int = 2
    model: str | None = None
    """VLMBATCH_MODEL."""


def _good(*options: str, says: Sequence[str], exit_code: int = 2) -> Refused:
    return Refused(["run", "good.parquet", *CAPTION, *options], says, exit_code)


def _asked(*options: str, says: Sequence[str]) -> Refused:
    return Refused(["run", "good.parquet", *ECHO, *options], says)


def _manifest(*names: str, says: Sequence[str]) -> Refused:
    return Refused(["run", *names, *CAPTION], says)


def _model(name: str, *says: str) -> Refused:
    return Refused(["run", "good.parquet", "-t", "caption", "-m", name], says)


IS_PARQUET = "check that the file is whole"
REFUSED = [
    _manifest("nope.parquet", says=["no manifest nope.parquet", "good.parquet"]),
    _manifest("no/where.parquet", says=["there is no folder no"]),
    _manifest("bad/zero.parquet", says=["bad/zero.parquet", "0 bytes"]),
    _manifest("bad/csv.parquet", says=["bad/csv.parquet", "no Parquet file", IS_PARQUET]),
    _manifest("bad/truncated.parquet", says=["bad/truncated.parquet", "end is missing"]),
    _manifest("bad/footer.parquet", says=["bad/footer.parquet", "thrift", IS_PARQUET]),
    _manifest("bad/length.parquet", says=["bad/length.parquet", IS_PARQUET]),
    _manifest("bad/dangling.parquet", says=["a link to gone.parquet", "does not exist"]),
    _manifest("bad/links", says=["bad/links/dangling.parquet", "No such file"]),
    _manifest("bad/nothing", says=["no manifest and no image in the folder bad/nothing"]),
    _manifest("bad/fifo.parquet", says=["a pipe", "give a file"]),
    _manifest("/dev/null", says=["/dev/null", "device"]),
    _manifest("*.nothing", says=["nothing matches *.nothing"]),
    _manifest("nope://bucket/m.parquet", says=["nothing here reads nope:", "s3:"]),
    _manifest("https://u:pw@h/m.parquet?k=v", says=["https://h/m.parquet with", "download it"]),
    _manifest("s3://key:pw@bucket/m.parquet", says=["credentials", "s3://bucket/m.parquet\n"]),
    _manifest("zip://m.csv::s3://bucket/m.zip", says=["inside an archive", "unpack it"]),
    _manifest("-", says=["cannot come from a pipe"]),
    _manifest("good.parquet", "bad/url.parquet", says=["other columns", "url: string"]),
    _manifest("bad/url.parquet", says=["no column 'image'", "url, caption", "--column image=url"]),
    _manifest("bad/twice.parquet", says=["several columns 'image'"]),
    _manifest("bad/number.parquet", says=["'image'", "int64", "path or URI"]),
    Refused(
        ["run", "bad/question.parquet", "-t", "vqa", *ECHO],
        ["'question'", "int64", "--column question=NAME"],
    ),
    Refused(
        ["run", "bad/url.parquet", *CAPTION, "--column", "image=ulr"],
        ["no column 'ulr'", "did you mean 'url'?"],
    ),
    _good("--column", "imag=n", says=["cannot rename 'imag'", "image, id"]),
    _good("--column", "image", says=["'image' is not KEY=VALUE"]),
    _good("--carry", "nn", says=["no column 'nn'", "did you mean 'n'?"]),
    _good("--carry", "id", says=["--carry id", "of their own"]),
    _good("--limit", "0", says=["at least 1, got 0 @ limit"]),
    _good("--limit", "many", says=["'many' is not a valid integer"]),
    _good(
        *("--checkpoint-rows", "0", "--max-failure-rate", "7"),
        says=["2 problems", "got 0 @ checkpoint_rows", "at most 1, got 7.0 @ max_failure_rate"],
    ),
    _good("--max-failure-rate", "nan", says=["got nan @ max_failure_rate"]),
    _good("--image-memory", "lots", says=["'lots' @ image_memory"]),
    _good("--style", "long", says=["'short', 'detailed'"]),
    _good("--executor", "slurm", says=["'auto', 'local', 'ray'"]),
    _good("--nope", says=["--nope"]),
    _good("--family", "nope", says=["unknown family 'nope'", "known: "]),
    _good("--engine-arg", "dleay=1", says=["no argument 'dleay'", "did you mean 'delay'?"]),
    _good("--engine-arg", "delay=fast", says=["delay=fast", "'fast'"]),
    _good("--engine-arg", "reply_from=nope", says=["no column 'nope'"]),
    _good("--engine-arg", "reply_from=image", says=["names the images"]),
    _asked("-t", "captoin", says=["unknown task 'captoin'", "caption, vqa"]),
    _asked("-t", "a/b", "--prompt", "x", says=["'a/b' is no name for a task"]),
    _asked("-t", "vqa", says=["needs a column 'question'", "--question TEXT"]),
    _asked("--prompt", "{{ x", says=["not a template", "it is Jinja"]),
    _asked("--prompt", "{{ nope }}", says=["names 'nope'", "no such field"]),
    _asked("--prompt", "@nofile", says=["cannot read nofile"]),
    _model("nobody/nothing", "nobody/nothing was not found", "-m demo"),
    _model("bad", "no config.json in the model folder", "csv.parquet"),
    _model("/no/such", "no such model folder: /no/such"),
    _model("~nosuchuser/x", "no such model folder: ~nosuchuser/x"),
    _model("x" * 300, "neither a model folder nor a Hub id"),
    Refused(
        ["run", "good.parquet", "-t", "caption"],
        ["'no such model' is neither a model folder"],
        model="no such model",
    ),
    _good("-o", "bad", says=["bad holds something else (csv.parquet", "-o"]),
    _good("-o", "bad", "--overwrite", says=["bad holds something else"]),
    _good("-o", "a.png", says=["a.png is a file, not a folder"]),
    _good("-o", "a.png/x/y", says=["a.png/x/y", "a.png is a file"]),
    _good("-o", "alien", exit_code=1, says=["run.json was not written by this version"]),
    _good("-o", "broken", exit_code=1, says=["cannot read broken/__vlmbatch/run.json"]),
    Refused(["status", "nope"], ["nope is no output"]),
    Refused(["retry", "bad"], ["bad is no output"]),
    Refused(["retry", "bad", "--codes", "nope"], ["unknown code 'nope'", "image_missing"]),
]


@pytest.fixture(scope="module")
def bad_files(here: Path) -> Path:
    bad = here / "bad"
    (bad / "links").mkdir(parents=True)
    (bad / "nothing").mkdir()
    good = (here / "good.parquet").read_bytes()
    length = int.from_bytes(good[-8:-4], "little")
    broken = {
        "zero": b"",
        "csv": b"image,question\na.png,what?\n" * 5,
        "truncated": good[: len(good) // 2],
        "footer": good[: -8 - length] + bytes(length) + good[-8:],
        "length": good[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1",
    }
    for name, data in broken.items():
        (bad / f"{name}.parquet").write_bytes(data)
    (bad / "dangling.parquet").symlink_to("gone.parquet")
    (bad / "links/dangling.parquet").symlink_to("gone.parquet")
    (bad / "links/good.parquet").symlink_to("../../good.parquet")
    os.mkfifo(bad / "fifo.parquet")
    table(bad / "url.parquet", url=["a.png"], caption=["x"])
    table(bad / "number.parquet", image=[1, 2])
    table(bad / "question.parquet", image=["a.png"], question=[3])
    pq.write_table(pa.table([["a"], ["b"]], names=["image", "image"]), bad / "twice.parquet")
    for name, text in (("alien", "{}"), ("broken", "{")):
        (here / name / "__vlmbatch").mkdir(parents=True)
        (here / name / "__vlmbatch/run.json").write_text(text)
    return here


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: shlex.join(map(str, case.args))[4:60])
def test_what_cannot_run_is_refused_with_one_message(
    case: Refused, bad_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, for speed: an exception that the command lets out would be a traceback."""
    monkeypatch.chdir(bad_files)
    before = sorted(path.name for path in bad_files.iterdir())
    done = CliRunner().invoke(main, case.args, env={"VLMBATCH_MODEL": case.model})
    if not isinstance(done.exception, SystemExit):
        raise AssertionError(done.output) from done.exception
    ended = Ended(done.exit_code, done.stdout, done.stderr)
    assert ended.exit_code == case.exit_code, str(ended)
    assert ended.stdout == ""
    assert ended.stderr.count("Error: ") == 1, str(ended)
    assert ended.stderr.count("\n") < 6, str(ended)
    for words in case.says:
        assert words in ended.stderr, str(ended)
    assert sorted(path.name for path in bad_files.iterdir()) == before


def test_an_argument_that_is_no_text_is_named(here: Path) -> None:
    ended = vlmbatch(here, "run", b"caf\xe9.parquet", *CAPTION)
    assert ended.exit_code == 2, str(ended)
    assert ended.stderr.startswith(
        "Error: an argument is not valid UTF-8: 'caf\\udce9.parquet'\n  -> "
    )


def test_an_output_answered_by_echo_is_not_taken_for_a_models(here: Path) -> None:
    assert vlmbatch(here, "run", "good.parquet", *CAPTION, "-o", "echoed").exit_code == 0
    again = vlmbatch(here, "run", "good.parquet", "-t", "caption", "-o", "echoed", "-m", "no/one")
    assert again.exit_code == 2, str(again)
    assert "model no/one was not found" in again.stderr
    part = here / "echoed/part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    for command in (["run", "good.parquet", *CAPTION, "-o", "echoed"], ["status", "echoed"]):
        ended = vlmbatch(here, *command)
        assert ended.exit_code == 1, str(ended)
        assert "Error: echoed/part-00000.parquet is not a result file" in ended.stderr
        assert "move it out of the output folder" in ended.stderr


# places and streams


def _private_mounts() -> bool:
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(
    not _private_mounts(), reason="no private tmpfs can be mounted here (root and unshare -m)"
)


@needs_mounts
def test_a_full_disk_stops_the_run_and_space_lets_it_go_on(here: Path, tmp_path: Path) -> None:
    noise = [os.urandom(2000).hex() for _ in range(400)]
    table(here / "big.parquet", image=["a.png"] * 400, big=noise, id=[str(i) for i in range(400)])
    space = "mount -t tmpfs -o size=1m none /mnt || exit 99; "
    more = '"$@"; echo CODE $? >&2; mount -o remount,size=64m /mnt || exit 98; "$@"; code=$?; '
    copy = 'cp -r /mnt/o "$COPY"; exit $code'
    options = [*CAPTION, "--carry", "big", "--checkpoint-rows", "16", "-o", "/mnt/o", "--json"]
    ended = vlmbatch(
        here,
        *("run", "big.parquet", *options),
        shell=f"exec unshare -m sh -c '{space}{more}{copy}' sh \"$@\"",
        environment={"COPY": str(tmp_path)},
    )
    assert ended.exit_code == 0, str(ended)
    first = ended.stderr.partition("CODE ")
    assert first[2].startswith("1\n"), str(ended)
    [line] = [line for line in first[0].splitlines() if line.startswith("Error: ")]
    assert line.startswith("Error: cannot write /mnt/o/__vlmbatch/")
    assert line.endswith(": No space left on device")
    summary = json.loads(ended.stdout)
    assert summary["ok"] + summary["skipped"] == 400
    assert summary["skipped"] > 0
    found = results(tmp_path / "o")
    assert [(row["row"], row["big"]) for row in found] == list(enumerate(noise))
    assert list((tmp_path / "o/__vlmbatch/tmp").iterdir()) == []


@needs_mounts
def test_a_place_that_cannot_be_written_is_named(here: Path) -> None:
    """A finished output, and the current folder, on a disk that is read-only by now."""
    steps = [
        "mount -t tmpfs none /mnt && cp good.parquet a.png /mnt && cd /mnt || exit 99",
        '"$@" -o /mnt/o >&2 || exit 98',
        "mount -o remount,ro /mnt || exit 97",
        '"$@" -o /mnt/o; echo CODE $?; "$@"; echo CODE $?',
        f"{sys.executable} -m vlmbatch status /mnt/o",
    ]
    shell = f"exec unshare -m sh -c '{'; '.join(steps)}' sh \"$@\""
    ended = vlmbatch(here, "run", "good.parquet", *CAPTION, shell=shell)
    assert ended.exit_code == 0, str(ended)
    assert ended.stdout.split("\n")[:2] == ["CODE 1", "CODE 1"]
    assert "/mnt/o: finished" in ended.stdout
    for place in ("/mnt/o/__vlmbatch/lock", "good-caption"):
        assert f"Error: cannot write {place}: Read-only file system\n  -> give" in ended.stderr


def test_the_run_needs_no_streams_no_home_and_no_locale(here: Path) -> None:
    run = ["run", "good.parquet", *CAPTION]
    starts: dict[str, tuple[str, Mapping[str, str | None]]] = {
        "no-stdin": ('exec "$@" <&-', {"PYTHONIOENCODING": "ascii"}),
        "no-streams": ('exec "$@" <&- >&- 2>&-', {}),
        "nobody-reads": ('{ "$@" 2>&1; echo $? >&3; } 3>code | true; exit $(cat code)', {}),
        "线é": ('exec "$@"', {"LC_ALL": "C", "HOME": None, "HF_HOME": None}),
    }

    def started(name: str) -> Ended:
        shell, environment = starts[name]
        return vlmbatch(here, *run, "-o", f"out {name}", shell=shell, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        for name, ended in zip(starts, pool.map(started, starts), strict=True):
            assert ended.exit_code == (1 if name == "nobody-reads" else 0), f"{name}: {ended}"
            assert len(results(here / f"out {name}")) == 3, f"{name}: {ended}"
    gone = vlmbatch(here, *run, shell='mkdir gone && cd gone && rmdir ../gone && exec "$@"')
    assert gone.exit_code in (1, 2), str(gone)
    assert gone.stderr.count("Error: ") == 1
