"""Which of tonight's rows are answered already: ids compared out of core, by DuckDB.

Memory is bounded by MEMORY, whatever the number of ids; what does not fit goes to a temporary
folder (in ``TMPDIR``), about 100 bytes per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from vlmbatch.errors import ErrorCode
from vlmbatch.incremental.rows import REPEATED
from vlmbatch.results.generations import TABLE, Kind, Selection
from vlmbatch.results.output import Output
from vlmbatch.scratch import Scratch

MEMORY = "1GB"
BATCH_ROWS = 65_536

TRANSIENT = (
    ErrorCode.FETCH_TIMEOUT,
    ErrorCode.FETCH_FAILED,
    ErrorCode.ENGINE_TIMEOUT,
    ErrorCode.ENGINE_FAILED,
)
"""Another night may do better. Else only another image does, or ``vlmbatch retry``."""
OF_IMAGE = (
    ErrorCode.IMAGE_MISSING,
    ErrorCode.IMAGE_FORBIDDEN,
    ErrorCode.IMAGE_UNREADABLE,
    ErrorCode.IMAGE_TOO_LARGE,
)

TONIGHT = pa.schema([("position", pa.int64()), ("id", pa.string()), ("version", pa.string())])
_READ = ["row", "id", "request", "sample", "status", "error", "attempts"]
_RESULTS = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("first", pa.bool_()),
        ("code", pa.string()),
        ("attempts", pa.int64()),
    ]
)
_VERSIONS = pa.schema([("row", pa.int64()), ("version", pa.string()), ("start", pa.int64())])
_ADDED = pa.schema([("first", pa.int64()), ("stop", pa.int64()), ("start", pa.int64())])

_SQL = {
    "answered": "CREATE VIEW answered AS SELECT row, id FROM results WHERE first",
    # A row that a later start filled anew has the version of that one.
    "versions": """
        CREATE TABLE versions AS SELECT row, arg_max(version, start) AS version
        FROM known k WHERE NOT EXISTS (
            SELECT 1 FROM added a WHERE a.start > k.start AND k.row >= a.first AND k.row < a.stop
        ) GROUP BY row""",
    # Another version of the image stays unsaid: a retry leaves the row's other results as they are,
    # and the next night asks it as a whole. Of an id that a run over one manifest had several
    # times, the first row is the one.
    "failed": f"""
        CREATE TABLE again AS
        SELECT l.row, l.position, {Kind.FAILED:d}::TINYINT AS kind,
               CASE WHEN v.version IS NULL OR v.version = l.version THEN l.version END AS version
        FROM (SELECT f.row, min(t.position) AS position,
                     arg_min_null(t.version, t.position) AS version
              FROM (SELECT DISTINCT row, id FROM results WHERE code IS NOT NULL
                    AND (len($codes) = 0 OR list_contains($codes, code)) AND attempts < $most) f
              JOIN tonight t USING (id)
              WHERE NOT EXISTS (SELECT 1 FROM answered a WHERE a.id = f.id AND a.row < f.row)
              GROUP BY f.row) l
        LEFT JOIN versions v USING (row)""",
    "looked": """
        CREATE TABLE looked AS
        SELECT l.row, l.position, l.version, v.version AS before
        FROM (SELECT min(a.row) AS row, min(t.position) AS position,
                     arg_min_null(t.version, t.position) AS version
              FROM answered a JOIN tonight t USING (id) GROUP BY id) l
        LEFT JOIN versions v USING (row)
        WHERE l.version IS NOT NULL AND v.version IS DISTINCT FROM l.version""",
    # An image that was not there, or was broken, when nobody looked: now there is one.
    "changed": f"""
        CREATE TABLE changed AS SELECT row, position, version,
        CASE WHEN before IS NOT NULL
               OR row IN (SELECT row FROM results WHERE list_contains($of_image, code))
             THEN {Kind.CHANGED:d} ELSE {Kind.SEEN:d} END::TINYINT AS kind FROM looked""",
    # What changed is asked anew as a whole, also where some of it had failed.
    "both": f"""
        DELETE FROM again WHERE row IN (SELECT row FROM changed WHERE kind = {Kind.CHANGED:d});
        DELETE FROM changed WHERE row IN (SELECT row FROM again);
        INSERT INTO again SELECT row, position, kind, version FROM changed""",
    "unanswered": """
        CREATE TABLE unanswered AS SELECT position, id FROM tonight t
        WHERE NOT EXISTS (SELECT 1 FROM answered a WHERE a.id = t.id)""",
    "fresh": f"""
        CREATE TABLE fresh AS
        SELECT u.position, CASE WHEN f.id IS NULL OR f.position = u.position
                           THEN {Kind.NEW:d} ELSE {Kind.REPEATED:d} END::TINYINT AS kind
        FROM unanswered u LEFT JOIN (
            SELECT id, min(position) AS position FROM unanswered GROUP BY id HAVING count(*) > 1
        ) f USING (id)""",
}


class Ids(Scratch):
    """What an output has answered, and what tonight's manifest has."""

    def __init__(self) -> None:
        super().__init__(MEMORY)

    def compare(
        self,
        output: Output | None,
        tonight: Iterator[pa.RecordBatch],
        selections: Iterable[Selection] = (),
        undone: Iterable[int] = (),
    ) -> None:
        """``tonight``: (position, id, version) of the manifest's rows; versions may be null.

        ``selections``: of earlier starts, in their order; ``undone``: output rows of the last one
        whose changed images it did not come to.
        """
        self.load("results", _RESULTS, iter(()) if output is None else _results(output))
        self.run(_SQL["answered"])
        earlier = list(enumerate(selections))
        self.load("added", _ADDED, _added(earlier))
        self.load("known", _VERSIONS, _known(earlier, set(undone)))
        self.run(_SQL["versions"])
        self.load("tonight", TONIGHT, tonight)

    def choose_again(self, codes: Iterable[str], max_attempts: int | None) -> None:
        """The failed results with these codes (empty: all) whose rows the manifest still has."""
        most = 2**31 if max_attempts is None else max_attempts
        self.run(_SQL["failed"], {"codes": sorted(codes), "most": most})

    def choose_changed(self) -> None:
        """The answered rows whose images have another version than they had."""
        self.run(_SQL["looked"])
        self.run(_SQL["changed"], {"of_image": list(OF_IMAGE)})
        self.run(_SQL["both"])

    def choose_new(self) -> None:
        """The rows whose id is not answered; of those with one id, the first is NEW."""
        self.run(_SQL["unanswered"])
        self.run(_SQL["fresh"])

    def counts(self, table: str) -> dict[Kind, int]:
        """Rows of ``again`` or ``fresh`` by kind."""
        rows = self.run(f"SELECT kind, count(*) FROM {table} GROUP BY kind").fetchall()
        return {Kind(kind): count for kind, count in rows}

    def fresh(self) -> Iterator[tuple[int, int, Kind, str | None]]:
        """(position, rows, kind, version) in the order of the manifest; rows that follow on each
        other are one where they have no versions."""
        query = "SELECT position, kind, version FROM fresh JOIN tonight USING (position)"
        if not self.run("SELECT count(version) FROM tonight").fetchall()[0][0]:
            query = "SELECT position, kind, NULL::VARCHAR AS version FROM fresh"
        for batch in self.batches(f"{query} ORDER BY position", BATCH_ROWS):
            yield from _runs(batch)

    def located(self) -> Iterator[pa.RecordBatch]:
        """The answered rows that the manifest has, as generations have them."""
        yield from self.batches(
            f"""SELECT min(a.row) AS row, min(t.position) AS position, 1::BIGINT AS rows,
                {Kind.NEW:d}::TINYINT AS kind, NULL::VARCHAR AS version
            FROM answered a JOIN tonight t USING (id) GROUP BY id ORDER BY row""",
            BATCH_ROWS,
        )

    def again(self) -> Iterator[pa.RecordBatch]:
        """As generations have it, ascending by row of the output."""
        for batch in self.batches(
            "SELECT row, position, 1::BIGINT AS rows, kind, version FROM again ORDER BY row",
            BATCH_ROWS,
        ):
            yield batch.select(TABLE.names)


def _results(output: Output) -> Iterator[pa.RecordBatch]:
    """The first result of each row, and all that failed.

    Nothing of rows that only repeat an id: they say nothing of it, and it may be unanswered where
    a start was killed between the two.
    """
    for batch in output.results(columns=_READ):
        first = pc.and_(pc.equal(batch["request"], 0), pc.equal(batch["sample"], 0))
        code = pc.struct_field(batch["error"], "code")
        repeats = pc.fill_null(
            pc.equal(pc.struct_field(batch["error"], "message"), REPEATED), False
        )
        wanted = pc.or_(first, pc.equal(batch["status"], "failed"))
        wanted = pc.and_not(wanted, repeats)
        columns = [batch["row"], batch["id"], first, code, batch["attempts"].cast(pa.int64())]
        yield pa.record_batch(columns, schema=_RESULTS).filter(wanted)


def _added(selections: Iterable[tuple[int, Selection]]) -> Iterator[pa.RecordBatch]:
    for start, selection in selections:
        rows = [(each.first, each.stop, start) for each in selection.generation.added]
        if rows:
            yield pa.record_batch(list(map(list, zip(*rows, strict=True))), schema=_ADDED)


def _known(selections: list[tuple[int, Selection]], undone: set[int]) -> Iterator[pa.RecordBatch]:
    for start, selection in selections:
        for batch in selection.batches():
            known = batch.filter(pc.is_valid(batch["version"]))
            if undone and start == selections[-1][0]:
                rows = pa.array(sorted(undone), pa.int64())
                known = known.filter(pc.invert(pc.is_in(known["row"], value_set=rows)))
            starts = pa.repeat(pa.scalar(start, pa.int64()), known.num_rows)
            yield pa.record_batch([known["row"], known["version"], starts], schema=_VERSIONS)


def _runs(batch: pa.RecordBatch) -> Iterator[tuple[int, int, Kind, str | None]]:
    """Rows that follow on each other and are of one kind, without a version, as one."""
    positions, kinds, versions = (batch[name] for name in ("position", "kind", "version"))
    goes_on = pc.and_(
        pc.equal(pc.pairwise_diff(positions), 1),
        pc.and_(pc.equal(pc.pairwise_diff(kinds.cast(pa.int64())), 0), pc.is_null(versions)),
    )
    begins = pc.indices_nonzero(pc.invert(pc.fill_null(goes_on, False)))
    starts = begins.to_pylist()
    rows = [stop - start for start, stop in zip(starts, [*starts[1:], len(batch)], strict=True)]
    for position, count, kind, version in zip(
        positions.take(begins).to_pylist(),
        rows,
        kinds.take(begins).to_pylist(),
        versions.take(begins).to_pylist(),
        strict=True,
    ):
        yield position, count, Kind(kind), version
