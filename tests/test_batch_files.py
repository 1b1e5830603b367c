"""Batch files: requests go out as JSONL, answers come back in any order, and nothing is asked
twice, lost or doubled on the way."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.endpoint_faults import FakeEndpoint, prompt_of
from tests.endpoint_faults import completion as endpoint_completion
from tests.harness import (
    OURS,
    Command,
    EchoLog,
    Quiz,
    assert_adds_up,
    assert_whole,
    committed_rows,
    echo,
    picture,
    quiz,
    read_results,
    run_json,
    until,
    vlmbatch,
    write_manifest,
)
from vlmbatch.batches.custom_id import CustomId
from vlmbatch.exports.openai_batch import Exported, export_requests
from vlmbatch.grounding import Size

Answer = Callable[[dict[str, Any]], dict[str, Any]]


# what a batch API does


def completion(text: str, finish_reason: str = "stop") -> dict[str, Any]:
    """The body of a chat completion."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": "model-2026-01-01",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def result(custom_id: str, status: int = 200, **body: Any) -> dict[str, Any]:
    """A line of a result file, as OpenAI writes it."""
    response = {"status_code": status, "request_id": "req-1", "body": body}
    return {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": None}


def refused(custom_id: str, status: int, message: str, code: str | None = None) -> dict[str, Any]:
    return result(custom_id, status, error={"message": message, "type": "error", "code": code})


def vllm_refused(custom_id: str, status: int, message: str) -> dict[str, Any]:
    """A line of `vllm run-batch` (0.32)."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return {
        "id": "vllm-1",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": "vllm-batch-1", "body": None},
        "error": {"error": error},
    }


def expired(custom_id: str) -> dict[str, Any]:
    error = {"code": "batch_expired", "message": "This request could not be executed in time."}
    return {"id": "batch_req_1", "custom_id": custom_id, "response": None, "error": error}


def answer_of(request: dict[str, Any]) -> str:
    """The quiz's answer to one of its questions: `question 3.1?` -> `answer 3.1`."""
    text: str = request["body"]["messages"][-1]["content"][-1]["text"]
    return text.removesuffix("?").replace("question", "answer")


def right(request: dict[str, Any]) -> dict[str, Any]:
    return result(request["custom_id"], **completion(answer_of(request)))


def write_lines(path: Path, lines: Iterable[dict[str, Any] | str]) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def requests_in(folder: Path) -> list[dict[str, Any]]:
    """Every exported request, by row and request."""
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("requests-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return sorted(lines, key=lambda line: key_of(line["custom_id"]))


def key_of(custom_id: str) -> tuple[int, int, int]:
    found = CustomId.parse(custom_id)
    assert found is not None, custom_id
    return found.row, found.request, found.sample


def prepared(folder: Path, asked: Quiz, *options: str) -> Path:
    """An output in which nothing was asked yet."""
    output = folder / "out"
    made = vlmbatch("run", *asked.options, "-o", output, "--prepare", *options)
    assert made.exit_code == 0, made
    return output


def exported(output: Path, destination: Path, *options: str) -> list[dict[str, Any]]:
    made = vlmbatch("export", output, destination, "--to", "openai-batch", *options)
    assert made.exit_code == 0, made
    return requests_in(destination)


def imported(output: Path, *files: Path) -> dict[str, Any]:
    made = vlmbatch("import-batch", output, *files, "--json")
    assert made.exit_code in (0, 3), made
    summary: dict[str, Any] = made.json
    assert summary["exit_code"] == made.exit_code
    rows = summary["ok"] + summary["failed"] + summary["skipped"] + summary["left"]
    assert summary["rows"] == rows, summary
    return summary


def pixels_of(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


# export


def test_prepare_makes_an_output_and_asks_nothing(tmp_path: Path) -> None:
    asked = quiz(tmp_path, 5)
    log = EchoLog(tmp_path / "log")
    output = prepared(tmp_path, asked, f"--engine-arg=log={log.path}")
    assert len(log) == 0
    assert not list(output.glob("part-*"))
    assert vlmbatch("status", output, "--json").json["state"] == "prepared"
    before = run_json(output)["run"]
    ended = vlmbatch("run", *asked.options, "-o", output, "--json")
    assert ended.exit_code == 0, ended
    assert run_json(output)["run"] == before
    assert_whole(output, asked.answers, ids=asked.ids)


def test_a_request_has_all_that_a_server_needs(tmp_path: Path) -> None:
    images = [picture(8, 6, "red"), picture(3, 9, "blue")]
    columns = {"image": images, "question": ["What?", "Who?"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    output = tmp_path / "out"
    options = ["-t", "vqa", "--system", "Be brief.", "--max-tokens=9", "--seed=4", *echo()]
    made = vlmbatch("run", manifest, *options, "-o", output, "--prepare")
    assert made.exit_code == 0, made
    first, second = exported(output, tmp_path / "requests", "--model", "some/model")
    run = run_json(output)["run"]
    assert first["custom_id"] == f"vlmbatch-{run}-0-0-0-8x6"
    assert second["custom_id"] == f"vlmbatch-{run}-1-0-0-3x9"
    assert set(first) == {"custom_id", "method", "url", "body"}
    assert (first["method"], first["url"]) == ("POST", "/v1/chat/completions")
    body = first["body"]
    assert body["model"] == "some/model"
    assert body["max_tokens"] == 9
    assert body["temperature"] == 0
    assert body["seed"] == 4
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["role"] == "user"
    image, text = user["content"]
    assert text == {"type": "text", "text": "What?"}
    assert image["type"] == "image_url"
    assert (
        pixels_of(image["image_url"]["url"]).tobytes()
        == Image.open(io.BytesIO(images[0])).tobytes()
    )


def test_files_end_at_the_limits_and_keep_a_row_together(tmp_path: Path) -> None:
    asked = quiz(tmp_path, 20)  # 27 requests: 2 for every third row
    output = prepared(tmp_path, asked)
    by_count = export(output, tmp_path / "a", file_requests=4)
    assert by_count.requests == 27
    counts = [len(Path(path).read_text().splitlines()) for path in by_count.files]
    assert sum(counts) == 27
    assert max(counts) <= 4
    assert_rows_together(by_count.files)
    line = max(map(len, Path(by_count.files[0]).read_bytes().splitlines())) + 3
    by_size = export(output, tmp_path / "b", file_bytes=5 * line)
    assert max(Path(path).stat().st_size for path in by_size.files) <= 5 * line
    assert len(by_size.files) >= 5
    assert_rows_together(by_size.files)
    assert requests_in(tmp_path / "a") == requests_in(tmp_path / "b")


def test_a_request_above_the_size_of_a_file_is_left_to_the_run(tmp_path: Path) -> None:
    columns = {"image": [picture(4, 4), noise(64)], "question": ["What?", "Who?"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    output = tmp_path / "out"
    assert vlmbatch("run", manifest, "-t", "vqa", *echo(), "-o", output, "--prepare").exit_code == 0
    summary = export(output, tmp_path / "requests", file_bytes=5_000)
    assert (summary.exported, summary.too_large, summary.failed) == (1, 1, 0)
    assert [key_of(line["custom_id"])[0] for line in requests_in(tmp_path / "requests")] == [0]
    assert committed_rows(output) == set()


def export(output: Path, destination: Path, **limits: int) -> Exported:
    return export_requests(str(output), str(destination), **limits)


def noise(side: int) -> bytes:
    """A picture that PNG cannot make small."""
    pixels = random.Random(1).randbytes(side * side * 3)
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(file, format="PNG")
    return file.getvalue()


def assert_rows_together(files: Sequence[str]) -> None:
    rows = [
        {key_of(json.loads(line)["custom_id"])[0] for line in Path(path).read_text().splitlines()}
        for path in files
    ]
    assert sum(map(len, rows)) == len(set().union(*rows))


def test_rows_that_cannot_be_asked_get_their_failed_results_at_once(tmp_path: Path) -> None:
    images = [picture(), b"no image", picture(), picture()]
    columns = {"image": images, "question": ["a?", "b?", None, "d?"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    output = tmp_path / "out"
    assert vlmbatch("run", manifest, "-t", "vqa", *echo(), "-o", output, "--prepare").exit_code == 0
    made = vlmbatch("export", output, tmp_path / "req", "--to", "openai-batch", "--json")
    assert made.exit_code == 0, made
    assert made.json["exported"] == 2
    assert made.json["failed"] == 2
    assert made.json["failures"] == {"image_unreadable": 1, "bad_row": 1}
    assert committed_rows(output) == {1, 2}
    requests = requests_in(tmp_path / "req")
    answers = [result(line["custom_id"], **completion("yes")) for line in requests]
    summary = imported(output, write_lines(tmp_path / "results.jsonl", answers))
    assert (summary["ok"], summary["skipped"], summary["left"]) == (2, 2, 0)
    failed = {1: "image_unreadable", 2: "bad_row"}
    table = read_results(output)
    assert table["text"].to_pylist() == ["yes", None, None, "yes"]
    codes = [error and error["code"] for error in table["error"].to_pylist()]
    assert codes == [failed.get(row) for row in range(4)]


def test_a_folder_with_something_in_it_is_not_written_over(tmp_path: Path) -> None:
    asked = quiz(tmp_path, 3)
    output = prepared(tmp_path, asked)
    requests = exported(output, tmp_path / "requests")
    write_lines(tmp_path / "requests" / "results.jsonl", map(right, requests))
    again = vlmbatch("export", output, tmp_path / "requests", "--to", "openai-batch")
    assert again.exit_code == 2, again
    assert "--overwrite" in again.stderr
    imported(output, tmp_path / "requests" / "results.jsonl")
    assert exported(output, tmp_path / "requests", "--overwrite") == []
    assert [path.name for path in (tmp_path / "requests").iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("place", [".", "requests"])
def test_an_output_holds_no_export(tmp_path: Path, place: str) -> None:
    output = prepared(tmp_path, quiz(tmp_path, 3))
    made = vlmbatch("export", output, output / place, "--to", "openai-batch")
    assert made.exit_code == 2, made
    assert [path.name for path in output.iterdir()] == [OURS]


def test_only_an_output_can_be_exported(tmp_path: Path) -> None:
    made = vlmbatch("export", tmp_path / "nothing", tmp_path / "r", "--to", "openai-batch")
    assert made.exit_code == 2, made
    assert "--prepare" in made.stderr
    assert not (tmp_path / "nothing").exists()


# import


def test_answers_in_any_order_become_the_results_of_their_rows(tmp_path: Path) -> None:
    """With errors, duplicates, lines of other runs and broken lines among them."""
    asked = quiz(tmp_path, 60)
    output = prepared(tmp_path, asked, "--part-rows=16", "--checkpoint-rows=7")
    requests = exported(output, tmp_path / "requests")
    by_row = {
        key_of(line["custom_id"])[0]: line for line in requests if key_of(line["custom_id"])[1] == 0
    }
    faults = {
        1: refused(by_row[1]["custom_id"], 429, "slow down", "rate_limit_exceeded"),
        2: refused(by_row[2]["custom_id"], 400, "too long", "context_length_exceeded"),
        4: vllm_refused(
            by_row[4]["custom_id"], 400, "The prompt is longer than the maximum model length of 5"
        ),
        5: expired(by_row[5]["custom_id"]),
        7: refused(by_row[7]["custom_id"], 500, "internal"),
        8: result(by_row[8]["custom_id"], **completion("")),
        10: result(by_row[10]["custom_id"]),
        11: result(by_row[11]["custom_id"], **endpoint_completion(None, refusal="I cannot.")),
    }
    codes = {
        1: "engine_failed",
        2: "prompt_too_long",
        4: "prompt_too_long",
        5: "engine_failed",
        7: "engine_failed",
        8: "parse_failed",
        10: "engine_failed",
        11: "engine_failed",
    }
    lines: list[dict[str, Any] | str] = []
    for request in requests:
        row = key_of(request["custom_id"])[0]
        lines.append(faults[row] if row in faults else right(request))
    lines += [right(requests[0]), expired(requests[3]["custom_id"])]  # an ok one stays
    other = CustomId("beef", 0, 0, 0, Size(1, 1))
    lines += [result(str(other), **completion("foreign")), result("mine", **completion("foreign"))]
    lines += ["not json", '{"custom_id": 3', "[]", ""]
    random.Random(3).shuffle(lines)
    half = len(lines) // 2
    files = [
        write_lines(tmp_path / "b.jsonl", lines[:half]),
        write_lines(tmp_path / "a.jsonl", lines[half:]),
    ]
    summary = imported(output, *files)
    assert summary["exit_code"] == 3  # 8 of 60 rows
    assert (summary["ok"], summary["failed"], summary["skipped"], summary["left"]) == (52, 8, 0, 0)
    assert summary["failures"] == {"engine_failed": 5, "prompt_too_long": 2, "parse_failed": 1}
    assert summary["duplicates"] == 2
    assert summary["foreign"] == 2
    assert summary["broken"] == 3
    assert any("a.jsonl:" in line or "b.jsonl:" in line for line in summary["warnings"])
    assert_answered(output, asked, codes)
    assert vlmbatch("status", output, "--json").json["state"] == "finished"

    again = imported(output, *files)
    assert (again["ok"], again["failed"], again["skipped"], again["replaced"]) == (0, 0, 60, 0)
    assert_answered(output, asked, codes)


def assert_answered(output: Path, asked: Quiz, codes: dict[int, str]) -> pa.Table:
    """As assert_whole has it, but failed results may have raw texts."""
    table = read_results(output)
    wanted = [(row, i) for row, texts in enumerate(asked.answers) for i in range(len(texts))]
    assert list(zip(table["row"].to_pylist(), table["request"].to_pylist(), strict=True)) == wanted
    found = [error and error["code"] for error in table["error"].to_pylist()]
    assert found == [codes.get(row) for row, _ in wanted]
    texts = [None if row in codes else asked.answers[row][i] for row, i in wanted]
    assert table["text"].to_pylist() == texts
    assert table["attempts"].to_pylist() == [1] * len(wanted)
    assert table["image_width"].to_pylist() == [8] * len(wanted)
    ok = [status == "ok" for status in table["status"].to_pylist()]
    tokens = [7 if fine else None for fine in ok]
    assert [
        n if fine else None for n, fine in zip(table["prompt_tokens"].to_pylist(), ok, strict=True)
    ] == tokens
    return table


def test_the_run_does_only_what_the_batch_left(tmp_path: Path) -> None:
    asked = quiz(tmp_path, 30)
    log = EchoLog(tmp_path / "log")
    options = [
        *asked.options,
        f"--engine-arg=log={log.path}",
        "-o",
        str(tmp_path / "out"),
        "--json",
    ]
    assert vlmbatch("run", *options, "--limit=4").exit_code == 0
    assert vlmbatch("run", *options, "--prepare").exit_code == 0
    output = tmp_path / "out"
    requests = exported(output, tmp_path / "requests")
    assert {key_of(line["custom_id"])[0] for line in requests} == set(range(4, 30))
    kept = [
        line for line in requests if key_of(line["custom_id"]) != (6, 1, 0)
    ]  # row 6: one of two
    kept = [line for line in kept if key_of(line["custom_id"])[0] % 5]
    summary = imported(output, write_lines(tmp_path / "results.jsonl", map(right, kept)))
    left = {5, 6, 10, 15, 20, 25}
    assert summary["skipped"] == 4
    assert summary["left"] == len(left)
    assert summary["incomplete"] == 1
    assert committed_rows(output) == set(range(30)) - left
    before = len(log)
    ended = vlmbatch("run", *options)
    assert ended.exit_code == 0, ended
    assert_adds_up(ended.json)
    assert {line.row for line in log.lines()[before:]} == left
    assert_whole(output, asked.answers, ids=asked.ids)


def test_failed_results_are_asked_by_the_next_batch_or_by_retry(tmp_path: Path) -> None:
    asked = quiz(tmp_path, 12)
    output = prepared(tmp_path, asked)
    requests = exported(output, tmp_path / "first")
    bad = {1, 5, 9}
    lines = [
        expired(line["custom_id"]) if key_of(line["custom_id"])[0] in bad else right(line)
        for line in requests
    ]
    imported(output, write_lines(tmp_path / "first.jsonl", lines))
    again = exported(output, tmp_path / "second")
    assert {key_of(line["custom_id"])[0] for line in again} == bad
    lines = [right(line) for line in again if key_of(line["custom_id"])[0] != 9]
    summary = imported(output, write_lines(tmp_path / "second.jsonl", lines))
    assert summary["replaced"] == 2
    ended = vlmbatch("retry", output, "--json")
    assert ended.exit_code == 0, ended
    assert ended.json["ok"] == 1
    table = assert_whole(output, asked.answers, ids=asked.ids)
    assert max(table["attempts"].to_pylist()) == 2


def test_boxes_are_pixels_of_the_image_as_it_was_exported(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(200, 100))
    table = pa.table({"image": ["a.png"]})
    pq.write_table(table, tmp_path / "m.parquet")
    output = tmp_path / "out"
    options = ["-t", "detect", "--labels", "cat", *echo(), "-o", str(output), "--prepare"]
    assert vlmbatch("run", tmp_path / "m.parquet", *options).exit_code == 0
    [request] = exported(output, tmp_path / "requests")
    (tmp_path / "a.png").unlink()  # nobody needs it any more
    text = '[{"bbox_2d": [0, 500, 1000, 1000], "label": "cat"}]'
    answer = result(request["custom_id"], **completion(text))
    imported(output, write_lines(tmp_path / "results.jsonl", [answer]))
    [found] = read_results(output).to_pylist()
    assert (found["image_width"], found["image_height"]) == (200, 100)
    box = found["boxes"][0]
    assert (box["x1"], box["y1"], box["x2"], box["y2"]) == (0, 50, 200, 100)
    assert found["raw"] == text
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "empty"),
        (["what?"], "not JSON"),
        (['{"custom_id": "a", "body": {}}'], "file of requests"),
        ([result("mine", **completion("x"))], "no line of"),
        ([result("vlmbatch-beef-0-0-0-8x6", **completion("x"))], "another run"),
    ],
)
def test_a_file_without_a_usable_line_is_refused(
    tmp_path: Path, lines: list[Any], says: str
) -> None:
    asked = quiz(tmp_path, 3)
    output = prepared(tmp_path, asked)
    requests = exported(output, tmp_path / "requests")
    good = write_lines(tmp_path / "good.jsonl", map(right, requests))
    bad = write_lines(tmp_path / "bad.jsonl", lines)
    made = vlmbatch("import-batch", output, good, bad)
    assert made.exit_code == 2, made
    assert "bad.jsonl" in made.stderr
    assert says in made.stderr
    assert committed_rows(output) == set()
    assert vlmbatch("import-batch", output, tmp_path / "none.jsonl").exit_code == 2


def test_a_killed_import_loses_and_doubles_nothing(tmp_path: Path) -> None:
    asked = quiz(tmp_path, 300)
    output = prepared(tmp_path, asked, "--checkpoint-rows=2", "--part-rows=50")
    requests = exported(output, tmp_path / "requests")
    lines = list(map(right, requests))
    first, rest = lines[:300], lines[300:]
    random.Random(5).shuffle(first)
    file = write_lines(tmp_path / "results.jsonl", first)
    pipe = tmp_path / "rest.jsonl"
    os.mkfifo(pipe)  # read once, and at the second reading nothing comes: it waits for the kill
    after = len({CustomId.parse(line["custom_id"]).row for line in first}) - 1
    chance = random.Random(8)
    for _ in range(3):
        before = len(committed_rows(output))
        with Command("import-batch", output, file, pipe) as command:
            write_lines(pipe, rest)
            until(lambda n=before: len(committed_rows(output)) > min(n, after - 2), "a commit")
            time.sleep(chance.uniform(0, 0.2))
            assert command.is_running, command.wait()
            command.signal(signal.SIGKILL)
    pipe.unlink()
    summary = imported(output, file, write_lines(pipe, rest))
    assert summary["ok"] + summary["skipped"] == 300
    table = assert_whole(output, asked.answers, ids=asked.ids)
    assert table["attempts"].to_pylist() == [1] * table.num_rows


@contextmanager
def late_picture(wanted: threading.Event) -> Iterator[str]:
    """The address of a picture that nobody gets before it is wanted."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted.wait()
            with suppress(OSError):  # who asked may be dead
                self.send_response(200)
                self.end_headers()
                self.wfile.write(picture())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/late.png"
        finally:
            wanted.set()
            server.shutdown()


def test_a_killed_export_leaves_no_file_that_could_be_sent(tmp_path: Path) -> None:
    asked = quiz(tmp_path, 100)
    folder, wanted = tmp_path / "requests", threading.Event()
    (tmp_path / "here.png").write_bytes(picture())
    with late_picture(wanted) as address:
        columns = pq.read_table(asked.path).to_pydict()
        write_manifest(asked.path, {**columns, "image": [*["here.png"] * 99, address]})
        output = prepared(tmp_path, asked, "--allow-private-hosts")
        with Command("export", output, folder, "--to", "openai-batch") as command:
            until(lambda: list(folder.glob("*.tmp")), "the export has begun")
            assert command.is_running, command.wait()
            command.signal(signal.SIGKILL)
            command.wait()
        assert [path.name for path in folder.iterdir()] == ["requests-00000.jsonl.tmp"]
        wanted.set()
        requests = exported(output, folder)
    assert len(requests) == sum(map(len, asked.answers))
    assert [path.name for path in folder.iterdir()] == ["requests-00000.jsonl"]


def by_text(bodies: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(bodies, key=json.dumps)


@pytest.mark.parametrize("owner", ["vllm", "somebody"])
def test_a_batch_asks_and_is_read_as_the_openai_engine_asks_and_reads(
    tmp_path: Path, owner: str
) -> None:
    """Small and large images, and settings that not every endpoint takes."""
    images = [picture(8, 6), picture(300, 300, "blue"), picture(3, 3, "green")]
    columns = {"image": images, "question": ["What?", "Who?", "Why?"]}
    manifest = write_manifest(tmp_path / "m.parquet", columns)
    batch, live = tmp_path / "batch", tmp_path / "live"
    with FakeEndpoint(owner=owner) as endpoint:
        options = ["--engine", "openai", "--base-url", endpoint.url, "-m", "tiny", "--seed=5"]
        options += ["--system", "Be brief.", "--engine-arg", "omit=temperature"]
        options += ["--engine-arg", "max_tokens_field=max_completion_tokens"]
        command = ["run", manifest, "-t", "vqa", "-t", "caption", *options]
        assert vlmbatch(*command, "-o", batch, "--prepare").exit_code == 0
        assert not endpoint.bodies
        requests = exported(batch, tmp_path / "requests")
        made = vlmbatch(*command, "-o", live)
        assert made.exit_code == 0, made
        assert by_text(line["body"] for line in requests) == by_text(endpoint.bodies)
    lines = (
        result(line["custom_id"], **endpoint_completion(f"re: {prompt_of(line['body'])}"))
        for line in requests
    )
    imported(batch, write_lines(tmp_path / "results.jsonl", lines))
    assert read_results(batch).to_pylist() == read_results(live).to_pylist()


def test_a_custom_id_reads_as_it_was_written() -> None:
    for custom_id in (
        CustomId("0a1b2c3d", 0, 0, 0, Size(1, 1)),
        CustomId("f", 10**11, 10**8, 999, Size(65535, 2)),
        CustomId("f", 1, 2, 3, None),
    ):
        assert CustomId.parse(str(custom_id)) == custom_id
    for text in (
        "",
        "vlmbatch-x-1-1-1-1x1",
        "vlmbatch-a-1-1-1",
        "request-1",
        3,
        None,
        "vlmbatch-a-١-1-1-1x1",
    ):
        assert CustomId.parse(text) is None
