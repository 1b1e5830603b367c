"""Night after night over a manifest that grows, shrinks, changes and comes late: every image is
answered once, whatever is killed and whenever; and what failed for a while is tried again."""

import random
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.harness import (
    Command,
    EchoLog,
    Finished,
    assert_adds_up,
    echo,
    leftovers,
    meta_of,
    parts,
    picture,
    read_results,
    run_json,
    shards,
    until,
    vlmbatch,
    write_manifest,
)
from vlmbatch.records import Range
from vlmbatch.results.files import write_shard
from vlmbatch.results.store import LocalStore

PART_ROWS, CHECKPOINT_ROWS = 32, 8


@dataclass
class World:
    """Pictures that come and go, the manifest that lists tonight's, and what must be answered."""

    folder: Path
    version: dict[str, int] = field(default_factory=dict)
    """Of each picture that there ever was; 0: it has not arrived yet."""
    listed: list[str] = field(default_factory=list)
    answered: dict[str, int] = field(default_factory=dict)
    """The version that each id was last asked about, after a night that ended."""
    left_unasked: int = 0
    """Rows that were planned in a start that was killed, and left the manifest then."""

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def log(self) -> EchoLog:
        return EchoLog(self.folder / "echo.log")

    def arrive(self, identity: str, version: int = 1) -> None:
        self.version[identity] = version
        path = self.folder / "pictures" / f"{identity}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(
            picture() + b"\0" * version
        )  # what comes after a PNG's end is not looked at

    def words(self, *more: str, delay: float = 0) -> list[str]:
        columns = {
            "id": self.listed,
            "image": [f"pictures/{each}.png" for each in self.listed],
            "answer": [f"{each} v{self.version[each]}" for each in self.listed],
        }
        manifest = write_manifest(self.folder / "tonight.parquet", columns, row_group=20)
        return [
            *("run", str(manifest), "-t", "caption", "--incremental", "--detect-changes"),
            *echo(reply_from="answer", log=self.log.path, capacity=2, delay=delay),
            *(f"--part-rows={PART_ROWS}", f"--checkpoint-rows={CHECKPOINT_ROWS}"),
            "--max-failure-rate=1",
            *("-o", str(self.output), "--json", *more),
        ]

    def due(self) -> set[str]:
        """What tonight asks about."""
        return {each for each in self.listed if self.answered.get(each) != self.version[each]}

    def night(self) -> Finished:
        """Run to its end."""
        due, before = self.due(), len(self.log)
        done = vlmbatch(*self.words())
        assert done.exit_code == 0, done
        assert_adds_up(done.json)
        arrived = {each for each in due if self.version[each]}
        assert len(self.log) - before == len(arrived), "nothing else was asked, and nothing twice"
        self.assert_answered()
        return done

    def assert_answered(self) -> None:
        """Whole parts, dense rows, each id once, and tonight's with their newest answers."""
        assert not shards(self.output)
        assert not leftovers(self.output)
        self.answered.update({each: self.version[each] for each in self.listed})
        table = read_results(self.output)
        assert table["row"].to_pylist() == list(range(table.num_rows))
        found = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
        self.left_unasked += table["id"].to_pylist().count("") - self.left_unasked
        found.pop("", None)
        assert len(found) == table.num_rows - self.left_unasked
        for each in set(found) - set(self.answered):  # answered in a start that was killed
            self.answered[each] = self.version[each]
        texts = {each: f"{each} v{v}" if v else None for each, v in self.answered.items()}
        assert found == texts
        for number, part in enumerate(parts(self.output)):
            first, stop = number * PART_ROWS, min((number + 1) * PART_ROWS, table.num_rows)
            meta = meta_of(part)
            assert part.name == f"part-{number:05d}.parquet"
            assert (meta["first"], meta["stop"]) == (first, stop)


def assert_readable(output: Path, answered: dict[str, int]) -> None:
    """At any moment: whole files, no id twice, and nothing lost of what was answered."""
    found: list[str] = []
    for part in parts(output):
        found += pq.read_table(part, columns=["id"])["id"].to_pylist()
    assert len(found) == len(set(found))
    assert set(answered) <= set(found)


@pytest.mark.timeout(600)
def test_thirty_nights(tmp_path: Path):
    chance = random.Random(30)
    world = World(tmp_path)
    gone: list[str] = []
    twice = kills = 0
    for night in range(30):
        for _ in range(chance.choice([0, 3, 10, 25])):
            identity = f"id-{len(world.version)}"
            late = chance.random() < 0.1
            world.version[identity] = 0
            world.listed.insert(chance.randint(0, len(world.listed)), identity)
            if not late:
                world.arrive(identity)
        for identity in chance.sample(world.listed, min(len(world.listed), 3)):
            if chance.random() < 0.7:  # changed, or come at last
                world.arrive(identity, world.version[identity] + 1)
        if night % 5 == 4:  # the manifest shrinks, and some of it comes back another night
            world.listed += gone
            gone = chance.sample(world.listed, len(world.listed) // 4)
            world.listed = [each for each in world.listed if each not in gone]
        if night in (7, 8, 21):  # nobody ran it
            continue
        if night in (3, 11, 12, 16, 23, 27):
            for _ in range(30):
                world.listed.append(f"id-{len(world.version)}")
                world.arrive(world.listed[-1])
            kills += 1
            before = len(world.log)
            due = {each for each in world.due() if world.version[each]}
            with Command(*world.words("--executor=local", "--workers=2", delay=0.05)) as command:
                until(lambda n=before: len(world.log) >= n + 6, "answers")
                assert_readable(world.output, world.answered)
                command.signal(signal.SIGKILL, group=True)
                command.wait()
            assert vlmbatch("status", world.output, "--json").json["state"] == "killed"
            assert_readable(world.output, world.answered)
            if night == 12:  # the killed night's manifest is never seen again: some of it has gone
                world.listed = [each for each in world.listed if chance.random() < 0.5]
            done = vlmbatch(*world.words())
            assert done.exit_code == 0, done
            world.assert_answered()
            twice += len(world.log) - before - len(due & set(world.answered))
        else:
            world.night()
    assert 0 <= twice <= kills * 2 * 2 * CHECKPOINT_ROWS
    assert world.left_unasked < 30
    print(f"{len(world.version)} images, {kills} kills, {twice} answers computed twice")


def nightly(folder: Path, columns: dict[str, list], *more: str, **engine) -> Finished:
    """One night over a manifest with these columns; every answer is the row's ``answer``."""
    rows = len(next(iter(columns.values())))
    columns = {"image": ["one.png"] * rows, "answer": ["yes"] * rows, **columns}
    (folder / "one.png").write_bytes(picture())
    manifest = write_manifest(folder / "tonight.parquet", columns)
    return vlmbatch(
        *("run", manifest, "--incremental", "-o", folder / "out", "--json"),
        *echo(reply_from="answer", log=folder / "echo.log", **engine),
        *more,
    )


def test_what_is_asked_is_the_id_where_there_is_none(tmp_path: Path):
    asked = {"question": ["which colour?", "how many?"]}
    assert nightly(tmp_path, asked, "-t", "vqa").json["ok"] == 2
    asked["question"] = ["how many?", "what shape?", "which colour?"]
    second = nightly(tmp_path, asked, "-t", "vqa").json
    assert (second["rows"], second["ok"], second["skipped"]) == (3, 1, 2)
    table = read_results(tmp_path / "out")
    assert table["question"].to_pylist() == ["which colour?", "how many?", "what shape?"]


def test_embedded_images_need_an_id(tmp_path: Path):
    images = {"image": [picture(), picture(colour="blue")]}
    refused = nightly(tmp_path, images)
    assert refused.exit_code == 2
    assert "--incremental over embedded images needs an id column" in refused.stderr
    assert "--column id=NAME" in refused.stderr
    named = {**images, "key": [7, 8]}
    assert nightly(tmp_path, named, "--column", "id=key").json["ok"] == 2
    named = {"image": [picture()] * 3, "key": [8, 9, 7]}
    assert nightly(tmp_path, named, "--column", "id=key").json["ok"] == 1
    assert read_results(tmp_path / "out")["id"].to_pylist() == ["7", "8", "9"]


def test_the_same_name_in_another_folder_is_another_image(tmp_path: Path):
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "one.png").write_bytes(picture())
    options = ["-t", "caption", "--incremental", *echo(), "-o", tmp_path / "out"]
    assert vlmbatch("run", tmp_path / "monday", *options).exit_code == 0
    refused = vlmbatch("run", tmp_path / "tuesday", *options)
    assert refused.exit_code == 2
    assert "one.png is another image than before" in refused.stderr
    assert vlmbatch("run", tmp_path / "monday", *options).exit_code == 0
    shutil.rmtree(tmp_path / "out")
    for day in ("monday", "tuesday"):
        include = ["--include", f"{day}/*"]
        done = vlmbatch("run", tmp_path, *options, *include, "--json")
        assert done.exit_code == 0, done
        assert (done.json["ok"], done.json["skipped"]) == (1, 0)


def test_one_id_is_one_row(tmp_path: Path):
    first = nightly(tmp_path, {"id": ["a", "b", "a", "c", "a"]}, "--max-failure-rate=1")
    assert first.json["failures"] == {"bad_row": 2}
    assert "2 rows have the id of an earlier row" in first.stderr
    results = read_results(tmp_path / "out").to_pylist()
    assert [each["id"] for each in results] == ["a", "b", "a", "c", "a"]
    assert [each["status"] for each in results] == ["ok", "ok", "failed", "ok", "failed"]
    again = nightly(tmp_path, {"id": ["a", "a", "b", "c", "d"]}, "--max-failure-rate=1").json
    assert (again["ok"], again["failed"], again["skipped"]) == (1, 0, 4)


def test_what_repeats_an_id_is_never_asked(tmp_path: Path):
    """Neither by a retry nor because the image of its first row has changed."""
    options = ["--max-failure-rate=1", "--detect-changes"]
    columns = {"id": ["a", "b", "a"], "image": ["a.png", "one.png", "a.png"]}
    (tmp_path / "a.png").write_bytes(picture())
    assert nightly(tmp_path, columns, *options).json["ok"] == 2
    assert vlmbatch("retry", tmp_path / "out", "--json").json["ok"] == 0
    (tmp_path / "a.png").write_bytes(picture(width=30))
    again = nightly(tmp_path, columns, *options).json
    assert (again["ok"], again["skipped"]) == (1, 2)
    assert read_results(tmp_path / "out")["status"].to_pylist() == ["ok", "ok", "failed"]


def killed_before_its_first_row(folder: Path, ids: list[str]) -> None:
    """A start that came to all of these rows but the first one."""
    columns = {"id": ids, "image": ["one.png"] * len(ids), "answer": ["yes"] * len(ids)}
    (folder / "one.png").write_bytes(picture())
    manifest = write_manifest(folder / "tonight.parquet", columns)
    words = ["run", manifest, "--incremental", "-o", folder / "out", "--checkpoint-rows=1"]
    slow = echo(reply_from="answer", log=folder / "echo.log", hang_rows=0)
    with Command(*words, *slow) as command:
        until(lambda: len(shards(folder / "out")) == len(ids) - 1, "the rows after the first one")
        command.signal(signal.SIGKILL, group=True)
        command.wait()


def test_what_repeats_an_id_may_be_there_before_it(tmp_path: Path):
    """Where a start was killed before it came to the first row, that is asked by the next one."""
    killed_before_its_first_row(tmp_path, ["a", "b", "a"])
    options = ["--max-failure-rate=1", "--checkpoint-rows=1"]
    assert nightly(tmp_path, {"id": ["a", "b", "a"]}, *options).json["ok"] == 1
    table = read_results(tmp_path / "out")
    answered = table.filter(pc.equal(table["status"], "ok"))
    assert sorted(answered["id"].to_pylist()) == ["a", "b"]


def test_an_id_that_was_there_several_times_is_that_of_its_first_row(tmp_path: Path):
    """A run over one manifest asks each of them; what is an image of one is not of the others."""
    columns = {
        "id": ["a", "a"],
        "image": ["a.png", "gone.png"],
        "answer": ["red", "blue"],
    }
    (tmp_path / "a.png").write_bytes(picture())
    manifest = write_manifest(tmp_path / "first.parquet", columns)
    options = ["--max-failure-rate=1"]
    plain = ["run", manifest, *echo(reply_from="answer"), "-o", tmp_path / "out", *options]
    assert vlmbatch(*plain).exit_code == 0
    options.append("--detect-changes")
    assert nightly(tmp_path, columns, *options).json["skipped"] == 2
    assert vlmbatch("retry", tmp_path / "out", "--json").json["requests"] == 0
    (tmp_path / "a.png").write_bytes(picture(width=30))
    assert nightly(tmp_path, columns, *options).json["ok"] == 1
    assert read_results(tmp_path / "out")["text"].to_pylist() == ["red", None]


def test_a_row_that_left_the_manifest_is_no_failure_of_the_night(tmp_path: Path):
    killed_before_its_first_row(tmp_path, ["a", "b", "c"])
    done = nightly(tmp_path, {"id": ["b", "c"]})
    assert (done.exit_code, done.json["failures"]) == (0, {"bad_row": 1})


def test_a_damaged_generation_may_be_deleted(tmp_path: Path):
    assert nightly(tmp_path, {"id": ["a"]}).exit_code == 0
    damaged = tmp_path / "out" / "__vlmbatch" / "generations" / "0001.arrow"
    damaged.write_bytes(b"junk")
    stopped = nightly(tmp_path, {"id": ["a", "b"]})
    assert stopped.exit_code == 1
    assert f"cannot read {damaged}" in stopped.stderr
    assert "or delete it: it has no answers" in stopped.stderr
    damaged.unlink()
    done = nightly(tmp_path, {"id": ["a", "b"]}).json
    assert (done["ok"], done["skipped"]) == (1, 1)


def test_another_question_is_refused_by_name(tmp_path: Path):
    assert nightly(tmp_path, {"id": ["a"]}, "--prompt", "Say what you see.").exit_code == 0
    refused = nightly(tmp_path, {"id": ["a", "b"]}, "--prompt", "Describe it.")
    assert refused.exit_code == 2
    assert "tasks.caption.prompt: was 'Say what you see.', now 'Describe it.'" in refused.stderr
    plain = vlmbatch("run", tmp_path / "tonight.parquet", *echo(), "-o", tmp_path / "out")
    assert plain.exit_code == 2
    assert "add --incremental" in plain.stderr


def test_ids_come_from_a_column_every_night_or_never(tmp_path: Path):
    columns = {"image": ["one.png"]}
    assert nightly(tmp_path, columns).json["ok"] == 1
    refused = nightly(tmp_path, {**columns, "id": ["a"]})
    assert refused.exit_code == 2
    assert "had no column of ids ('id') before, and tonight's has one" in refused.stderr
    assert nightly(tmp_path, columns).json["skipped"] == 1
    other = ["-o", tmp_path / "other", "--column", "id=key"]
    assert nightly(tmp_path, {**columns, "key": ["a"]}, *other).json["ok"] == 1
    refused = nightly(tmp_path, columns, *other[:2])
    assert refused.exit_code == 2
    assert "had a column of ids ('key') before, and tonight's has none" in refused.stderr


def test_carried_columns_keep_their_types(tmp_path: Path):
    carry = ["--carry", "width", "--carry", "height"]
    columns = {"id": ["a"], "width": [3], "height": [4]}
    assert nightly(tmp_path, columns, *carry).json["ok"] == 1
    others = {"id": ["a", "b"], "width": [3, 3.5], "height": [4, 5]}
    refused = nightly(tmp_path, others, *carry)
    assert refused.exit_code == 2
    assert "were width: int64, height: int64, and are width: double" in refused.stderr
    others["width"] = [3, 4]
    refused = nightly(tmp_path, others, "--carry", "height", "--carry", "width")
    assert "were width: int64, height: int64, and are height: int64" in refused.stderr
    assert nightly(tmp_path, others, *carry).json["ok"] == 1
    assert read_results(tmp_path / "out")["height"].to_pylist() == [4, 5]


def test_a_run_over_one_manifest_may_go_on_night_after_night(tmp_path: Path):
    columns = {"image": ["one.png"] * 2, "answer": ["yes"] * 2, "id": ["a", "b"]}
    (tmp_path / "one.png").write_bytes(picture())
    manifest = write_manifest(tmp_path / "first.parquet", columns)
    options = [*echo(reply_from="answer"), "-o", tmp_path / "out"]
    assert vlmbatch("run", manifest, *options).exit_code == 0
    assert nightly(tmp_path, {"id": ["b", "c", "a"]}).json["ok"] == 1
    assert read_results(tmp_path / "out")["id"].to_pylist() == ["a", "b", "c"]


def test_what_failed_for_a_while_is_asked_again_so_often(tmp_path: Path):
    """engine_failed may pass; a missing image needs another one, or a retry."""
    columns = {"id": ["a", "b", "c"], "image": ["one.png", "one.png", "gone.png"]}
    options = ["--max-failure-rate=1", "--max-attempts=3"]
    log = EchoLog(tmp_path / "echo.log")
    first = nightly(tmp_path, columns, *options, fail_rows="1").json
    assert first["failures"] == {"engine_failed": 1, "image_missing": 1}
    for night in (2, 3):
        again = nightly(tmp_path, columns, *options, fail_rows="1")
        assert (again.exit_code, again.json["failures"]) == (0, {"engine_failed": 1})
        assert read_results(tmp_path / "out")["attempts"].to_pylist() == [1, night, 0]
    last = nightly(tmp_path, columns, *options, fail_rows="1").json
    assert (last["failed"], last["skipped"]) == (0, 3)
    assert len(log) == 1
    # Other rows by now, and the ids in another order: a retry finds them by their ids.
    columns["id"], columns["image"] = ["c", "x", "a"], ["one.png"] * 3
    assert nightly(tmp_path, columns, *options, fail_rows="1").json["ok"] == 1
    retried = vlmbatch("retry", tmp_path / "out", "--json").json
    assert (retried["ok"], retried["failed"]) == (1, 0), "b is in no manifest any more"
    results = read_results(tmp_path / "out").to_pylist()
    assert [each["id"] for each in results] == ["a", "b", "c", "x"]
    assert [each["status"] for each in results] == ["ok", "failed", "ok", "ok"]


def test_an_image_that_could_not_be_fetched_counts_as_an_attempt(tmp_path: Path):
    columns = {"id": ["a"], "image": ["http://127.0.0.1:9/never.png"]}
    options = ["--max-failure-rate=1", "--allow-private-hosts", "--max-attempts=2"]
    for attempts in (1, 2):
        assert nightly(tmp_path, columns, *options).json["failures"] == {"fetch_failed": 1}
        assert read_results(tmp_path / "out")["attempts"].to_pylist() == [attempts]
    assert nightly(tmp_path, columns, *options).json["skipped"] == 1


def test_a_changed_image_replaces_all_that_the_row_had(tmp_path: Path):
    """Also where it gives more requests now, or fewer."""
    columns = {
        "id": ["a", "b", "c"],
        "image": ["a.png", "b.png", "c.png"],
        "questions": [["1?", "2?"], ["1?"], ["1?"]],
        "answer": [["a1", "a2"], ["b1"], ["c1"]],
    }
    for name in columns["image"]:
        (tmp_path / name).write_bytes(picture())
    options = ["-t", "vqa", "--detect-changes"]
    assert nightly(tmp_path, columns, *options).json["requests"] == 4
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(picture(width=30))
    columns["questions"] = [["new?"], ["new?", "and?", "or?"], ["unseen?"]]
    columns["answer"] = [["A"], ["B1", "B2", "B3"], ["C"]]
    again = nightly(tmp_path, columns, *options).json
    assert (again["ok"], again["requests"], again["skipped"]) == (2, 4, 1)
    table = read_results(tmp_path / "out")
    assert table["text"].to_pylist() == ["A", "B1", "B2", "B3", "c1"]
    assert table["request"].to_pylist() == [0, 0, 1, 2, 0]
    assert table["image_width"].to_pylist() == [30, 30, 30, 30, 8]


def test_a_retry_hides_no_changed_image(tmp_path: Path):
    """It asks what failed, about the image as it is now; the next night asks the rest as well."""
    columns = {
        "id": ["a"],
        "image": ["a.png"],
        "questions": [["1?", "2?"]],
        "answer": [["a1", None]],
    }
    (tmp_path / "a.png").write_bytes(picture())
    options = ["-t", "vqa", "--detect-changes", "--max-failure-rate=1"]
    assert nightly(tmp_path, columns, *options).json["failures"] == {"parse_failed": 1}
    (tmp_path / "a.png").write_bytes(picture(width=30))
    columns["answer"] = [["A1", "A2"]]
    write_manifest(tmp_path / "tonight.parquet", columns)
    assert vlmbatch("retry", tmp_path / "out", "--json").json["requests"] == 1
    assert nightly(tmp_path, columns, *options).json["requests"] == 2
    assert read_results(tmp_path / "out")["text"].to_pylist() == ["A1", "A2"]
    assert nightly(tmp_path, columns, *options).json["skipped"] == 1


def test_what_is_read_anew_is_not_asked_anew(tmp_path: Path):
    """A reparse writes parts anew; which of their changed images were answered stays known."""
    answer = ['[{"bbox_2d": [250, 500, 500, 750], "label": "cat"}]']
    columns = {"id": ["a"], "image": ["a.png"], "answer": answer}
    (tmp_path / "a.png").write_bytes(picture())
    options = ["-t", "detect", "--labels", "cat", "--detect-changes"]
    assert nightly(tmp_path, columns, *options).exit_code == 0
    (tmp_path / "a.png").write_bytes(picture(width=30))
    assert nightly(tmp_path, columns, *options).json["ok"] == 1
    done = vlmbatch("reparse", tmp_path / "out", "--box-space", "0-1000-yxyx", "--json")
    assert done.json["changed"] == 1
    again = nightly(tmp_path, columns, *options)
    assert (again.json["ok"], again.json["skipped"]) == (0, 1)


def test_what_a_worker_of_an_earlier_start_commits_late_is_not_taken_for_new_rows(tmp_path: Path):
    """Its rows were planned anew meanwhile: as other rows, or as none."""
    output = tmp_path / "out"
    nightly(tmp_path, {"id": ["a", "b"]})
    nightly(tmp_path, {"id": ["a", "b", "c"]})
    late = read_results(output).slice(0, 2).replace_schema_metadata().combine_chunks()
    late = late.set_column(0, late.schema.field("row"), pa.array([3, 4], pa.int64()))
    store, run = LocalStore(output), run_json(output)["run"]
    write_shard(store, late.to_batches()[0], run=run, epoch=1, rows=Range(3, 5))
    third = nightly(tmp_path, {"id": ["a", "b", "c", "d"]}).json
    assert (third["ok"], third["skipped"]) == (1, 3)
    table = read_results(output)
    assert table["id"].to_pylist() == ["a", "b", "c", "d"]
    assert table["row"].to_pylist() == [0, 1, 2, 3]


def test_what_would_be_asked_tonight(tmp_path: Path):
    nightly(tmp_path, {"id": ["a", "b"]})
    manifest = write_manifest(
        tmp_path / "tonight.parquet",
        {"id": ["b", "c", "a", "d"], "image": ["one.png"] * 4, "answer": ["yes"] * 4},
    )
    before = sorted((tmp_path / "out").rglob("*"))
    planned = vlmbatch(
        *("plan", manifest, "--incremental", "-o", tmp_path / "out", "--json"),
        *echo(reply_from="answer"),
    ).json
    assert (planned["rows"], planned["to_do"], planned["answered"]) == (4, 2, 2)
    assert [each["row"] for each in planned["prompts"]] == [1, 3]
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_batch_files_are_of_one_manifest(tmp_path: Path):
    nightly(tmp_path, {"id": ["a"]})
    refused = vlmbatch("export", tmp_path / "out", "--to", "openai-batch", tmp_path / "batch")
    assert refused.exit_code == 2
    assert "grows by --incremental" in refused.stderr
    refused = vlmbatch("run", tmp_path / "tonight.parquet", "--detect-changes", *echo())
    assert refused.exit_code == 2
    assert "--detect-changes is for --incremental" in refused.stderr


def test_nights_on_an_object_store(tmp_path: Path, s3_server):
    output = f"s3://{s3_server.new_bucket()}/nights"
    with s3_server.in_environment():
        for ids, ok in ((["a", "b"], 2), (["b", "c", "a"], 1), (["c"], 0)):
            done = nightly(tmp_path, {"id": ids}, "-o", output)
            assert done.exit_code == 0, done
            assert done.json["ok"] == ok
        assert vlmbatch("status", output, "--json").json["done"] == 3


def test_an_export_finds_the_images_by_their_ids(tmp_path: Path):
    """Wherever tonight's manifest has them; what it has no more is left out and counted."""
    colours = {"a": "red", "b": "green", "c": "blue", "d": "white"}
    for ids in (["a", "b", "c"], ["d", "c", "a"]):
        images = [picture(colour=colours[each]) for each in ids]
        done = nightly(tmp_path, {"id": ids, "image": images, "answer": ids})
        assert done.exit_code == 0, done
    exported = vlmbatch("export", tmp_path / "out", "--to", "trl", tmp_path / "trl", "--json")
    assert exported.exit_code == 0, exported
    assert exported.json["dropped"] == {"not_in_manifest": 1}
    (written,) = (tmp_path / "trl").rglob("*.parquet")
    found = {
        row["messages"][-1]["content"]: row["images"][0]["bytes"]
        for row in pq.read_table(written).to_pylist()
    }
    assert found == {each: picture(colour=colours[each]) for each in ("a", "c", "d")}
