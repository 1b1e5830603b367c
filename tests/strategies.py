"""What hypothesis makes up: ranges of rows, sizes, boxes, results, files of results."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from hypothesis import strategies as st
from PIL import Image

from vlmbatch.errors import ErrorCode, Failure, RequestFailed, Stage
from vlmbatch.families import Family
from vlmbatch.grounding import Box, Size
from vlmbatch.records import Answer, Completion, LoadedImage, Range, Result, TaskKind
from vlmbatch.results.files import Counts


def ranges(limit: int, longest: int | None = None) -> st.SearchStrategy[Range]:
    """Ranges inside [0, limit)."""
    firsts = st.integers(0, limit - 1)
    lengths = st.integers(1, longest or limit)
    return st.builds(lambda first, n: Range(first, min(limit, first + n)), firsts, lengths)


def disjoint_ranges(limit: int) -> st.SearchStrategy[list[Range]]:
    """Ascending ranges inside [0, limit) with gaps between them, at least one."""
    rows = st.sets(st.integers(0, limit), min_size=2, max_size=12)
    return rows.map(sorted).map(lambda r: [Range(*r[i : i + 2]) for i in range(0, len(r) - 1, 2)])


def sizes(longest: int = 10_000) -> st.SearchStrategy[Size]:
    return st.builds(Size, st.integers(1, longest), st.integers(1, longest))


@st.composite
def images_with_box(draw: st.DrawFn, labels: st.SearchStrategy[str] | None = None):
    """(size, a box of at least a hundredth of a pixel inside it)."""
    size = draw(sizes())
    x1, x2 = _two(draw, size.width)
    y1, y2 = _two(draw, size.height)
    return size, Box(draw(labels or st.text(max_size=5)), x1, y1, x2, y2)


def _two(draw: st.DrawFn, limit: int) -> tuple[float, float]:
    low = draw(st.floats(0, limit - 0.01))
    return low, draw(st.floats(low + 0.01, limit))


def grid_boxes(steps: int, label: st.SearchStrategy[str]) -> st.SearchStrategy[Box]:
    """Boxes with whole coordinates from 0 to ``steps`` and some area."""
    edges = st.lists(st.integers(0, steps), min_size=2, max_size=2, unique=True).map(sorted)
    return st.builds(lambda n, x, y: Box(n, x[0], y[0], x[1], y[1]), label, edges, edges)


def result(row: int, request: int, sample: int, said: str, code: ErrorCode | None) -> Result:
    """One result that says where it comes from; a failed one if it has a code."""
    answered = code is None
    return Result(
        row=row,
        id=f"id{row}",
        task="caption",
        request=request,
        sample=sample,
        answer=Answer(text=said) if answered else None,
        completion=Completion(said, "length" if row % 3 == 0 else "stop", 7, len(said))
        if answered
        else None,
        failure=None if answered else Failure(code, Stage.GENERATE, said),
        attempts=row % 3,
    )


def codes() -> st.SearchStrategy[ErrorCode | None]:
    """Mostly None."""
    some = [None, None, None, ErrorCode.BAD_ROW, ErrorCode.ENGINE_FAILED]
    return st.sampled_from(some)


def union(pending: Iterable[Range]) -> set[int]:
    return {row for rows in pending for row in range(rows.first, rows.stop)}


def counted(results: Sequence[Result]) -> Counts:
    """The slow twin of Counting."""
    done = [r.completion for r in results if r.completion is not None]
    failures: dict[str, int] = {}
    for r in results:
        if r.failure is not None:
            failures[str(r.failure.code)] = failures.get(str(r.failure.code), 0) + 1
    return Counts.from_json(
        {
            "rows": len({r.row for r in results}),
            "failed_rows": len({r.row for r in results if not r.ok}),
            "requests": len(results),
            "failures": failures,
            "prompt_tokens": sum(c.prompt_tokens for c in done),
            "completion_tokens": sum(c.completion_tokens for c in done),
            "truncated": sum(c.finish_reason == "length" for c in done),
            "attempts": dict(Counter(str(r.attempts) for r in results if r.attempts)),
        }
    )


def mutated(texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """The texts with some pieces cut out, doubled or replaced."""

    def change(text: str, changes: list[tuple[int, int, str]]) -> str:
        for at, length, instead in changes:
            at %= len(text) + 1
            piece = text[at : at + length]
            text = text[:at] + (piece * 2 if instead == "twice" else instead) + text[at + length :]
        return text

    pieces = st.sampled_from(["", "twice", "<", ">", '"', "{", "]", "-", "9" * 30, "\\", "\0"])
    changes = st.tuples(st.integers(0, 999), st.integers(0, 9), pieces | st.text(max_size=3))
    return st.builds(change, texts, st.lists(changes, max_size=4))


def upright(size: Size) -> LoadedImage:
    """An image of which only the size matters."""
    return LoadedImage(Image.new("RGB", (1, 1)), size, "key")


def reads_or_fails(family: Family, text: str) -> None:
    """A family's ``read`` gives an answer with boxes inside the image, or parse_failed."""
    image = upright(Size(30, 20))
    for kind in TaskKind:
        answer, code = None, None
        try:
            answer = family.read(kind, text, labels=("cat",), image=image)
        except RequestFailed as error:
            code = error.failure.code
        if answer is None:
            assert code is ErrorCode.PARSE_FAILED
            continue
        if kind in (TaskKind.GROUND, TaskKind.DETECT):
            assert answer.boxes is not None
            assert all(0 <= b.x1 < b.x2 <= 30 and 0 <= b.y1 < b.y2 <= 20 for b in answer.boxes)
        else:
            assert answer.text


def seconds_to_read(family: Family, piece: str, length: int = 200_000) -> float:
    """Processor time to read an answer of so many characters, at most over some kinds."""
    text, longest = piece * (length // len(piece)), 0.0
    for kind in (TaskKind.GROUND, TaskKind.DETECT, TaskKind.CAPTION):
        before = time.process_time()
        with contextlib.suppress(RequestFailed):
            family.read(kind, text, labels=("cat",), image=upright(Size(30, 20)))
        longest = max(longest, time.process_time() - before)
    return longest
