"""JSONL and CSV as people write them: types, bad lines, quotes, giants, headers."""

import json
import subprocess
import sys
import textwrap

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.harness import echo, picture, read_results, vlmbatch
from tests.manifest.formats import rows_of, stream
from vlmbatch.errors import ManifestError
from vlmbatch.manifest import open_manifest, text
from vlmbatch.manifest.values import Misfit, fitted, schema_of, settled
from vlmbatch.records import Range


def write(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(path) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        open_manifest([str(path)])
    assert str(path) in caught.value.message
    return caught.value


def problems(path, *wanted) -> list[str | None]:
    return [row.problem for row in rows_of(path, wanted=wanted)]


# JSONL


def test_json_values_stay_as_they_are(tmp_path):
    records = [
        {"image": "a.png", "questions": ["x?", "y?"], "meta": {"k": 1}, "n": 1, "f": 1, "b": True},
        {"image": ["b.png", "c.png"], "questions": "z?", "meta": None, "n": None, "f": 2.5},
        {"image": {"path": "d.png"}, "questions": None, "new": "first seen here"},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records[:2])))
    schema = open_manifest([path]).schema
    assert schema.field("image").type == pa.list_(pa.string())
    assert schema.field("f").type == pa.float64()
    rows = rows_of(path, wanted=["meta", "n", "f", "b"])
    assert [[i.uri for i in row.images] for row in rows] == [["a.png"], ["b.png", "c.png"]]
    assert [row.fields["questions"] for row in rows] == [["x?", "y?"], ["z?"]]
    assert [row.fields[name] for row in rows for name in ("meta", "n", "f", "b")] == [
        *({"k": 1}, 1, 1.0, True),
        *(None, None, 2.5, None),
    ]
    path = write(tmp_path / "b.jsonl", json.dumps(records[2]))
    assert [row.images[0].uri for row in rows_of(path)] == ["d.png"]


BAD_LINES = {
    b'{"image": "a.png"': "the line is no JSON: Expecting ',' delimiter",
    b"not json": "the line is no JSON",
    b"[1, 2]": "the line is JSON, and no object",
    b"null": "the line is JSON, and no object",
    b'{"image": "\xff.png"}': "the line is no UTF-8 text",
    b'{"image": "\\ud800.png"}': "the line is no UTF-8 text",
    b'{"image": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "the line is nested too deeply",
    b'{"image": "a.png", "n": ' + b"9" * 5000 + b"}": "the line is no JSON: Exceeds the limit",
    b'{"image": 7}': None,  # text may be a number: the image 7 is missing
    b'{"image": ["a.png"]}': "column 'image' holds a list where the first rows hold text",
    b'{"image": null}': "the image is null",
    b"{}": "the image is null",
    b'{"image": "a.png", "n": "x"}': "column 'n' holds text where the first rows hold int64",
    b'{"image": "a.png", "n": 1.5}': "column 'n' holds a number where the first rows hold int64",
    b'{"image": "a.png", "question": ["x"]}': "column 'question' holds a list where",
}


def test_a_bad_line_is_a_bad_row_and_the_others_are_answered(tmp_path):
    good = b'{"image": "a.png", "n": 1, "question": "q?"}'
    head = [good] * 1000  # what the types are taken from
    lines = [*head, *(line for bad in BAD_LINES for line in (bad, good))]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    found = problems(path, "n")
    assert len(found) == len(lines)
    assert found[:1000] == [None] * 1000
    assert found[1001::2] == [None] * len(BAD_LINES)
    for problem, expected in zip(found[1000::2], BAD_LINES.values(), strict=True):
        assert (problem is None) if expected is None else problem.startswith(expected), problem


def test_a_run_fails_the_bad_lines_and_carries_what_fits(tmp_path):
    write(tmp_path / "a.png", picture())
    good = '{"image": "a.png", "meta": {"k": [1]}, "tag": "x"}'
    late = '{"image": "a.png", "meta": {"k": [2], "late": 1}, "tag": {"odd": 1}, "unseen": 1}'
    path = write(tmp_path / "a.jsonl", "\n".join([good] * 1200 + [late, "oops", good]))
    options = ["-t", "caption", "--carry=meta", "--carry=tag", *echo(), "-o", tmp_path / "out"]
    ended = vlmbatch("run", path, *options, "--json", "--executor=local")
    assert (ended.exit_code, ended.json["ok"], ended.json["failures"]) == (0, 1202, {"bad_row": 1})
    last = read_results(tmp_path / "out").slice(1199).to_pylist()
    assert [row["meta"] for row in last] == [{"k": [1]}, {"k": [2]}, None, {"k": [1]}]
    assert last[1]["tag"] == '{"odd": 1}'
    assert last[2]["error"]["message"].startswith("the line is no JSON")


def test_what_is_no_jsonl_is_refused(tmp_path):
    for name, content in (("empty.jsonl", b""), ("blank.jsonl", b"\n\n")):
        said = refused(write(tmp_path / name, content)).message
        assert said.endswith("has no rows, and so no columns")
    array = refused(write(tmp_path / "a.jsonl", '[\n{"image": "a"},\n{"image": "b"}]'))
    assert "its first line is no JSON" in array.message
    assert "jq -c" in str(array.hint)
    assert "JSON array" in refused(write(tmp_path / "c.json", '[{"image": "a"}]')).message
    assert rows_of(write(tmp_path / "d.json", '{"image": "a.png"}'))[0].images[0].uri == "a.png"
    assert refused(write(tmp_path / "e.jsonl", '{"image": 1}'.encode("utf-16"))).message
    assert "UTF-16" in refused(tmp_path / "e.jsonl").message
    assert "cannot read" in refused(write(tmp_path / "f.jsonl.gz", "no gzip")).message
    cut = text.gzip.compress(b'{"image": "a.png"}\n' * 1000)[:-20]
    assert "cannot read" in refused(write(tmp_path / "g.jsonl.gz", cut)).message
    assert "cannot read" in refused(write(tmp_path / "h.jsonl.zst", "no zstd")).message


@examples(max_examples=100)
@given(st.data())
def test_what_a_sample_has_fits_its_own_types(data):
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    values = st.recursive(
        scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
    )
    sample = data.draw(st.lists(st.dictionaries(st.sampled_from("abc"), values), max_size=4))
    schema = settled(schema_of(sample))
    for record in sample:
        for field in schema:
            value = fitted(record.get(field.name), field.type, as_json=True)
            pa.array([value], field.type)  # as the results hold it


@examples(max_examples=100)
@given(st.data())
def test_any_later_value_fits_or_is_a_misfit(data):
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    values = st.recursive(
        scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3)
    )
    kind = settled(schema_of([{"a": data.draw(values)}])).field("a").type
    try:
        value = fitted(data.draw(values), kind, as_json=data.draw(st.booleans()))
    except Misfit:
        return
    pa.array([value], kind)


# CSV


def test_cells_with_line_ends_quotes_and_lists(tmp_path):
    first = '"a.png",1,"[""x, y"", ""z""]","one\ntwo, ""three"""'
    cells = f'image,id,labels,note\n{first}\nb.png,,"x, y",\n'
    rows = rows_of(write(tmp_path / "a.csv", cells), wanted=["note"])
    assert [row.fields["note"] for row in rows] == ['one\ntwo, "three"', None]
    assert rows[0].id == "1"
    assert len(rows[1].id) == 32  # no id: that of the content
    write(tmp_path / "a.png", picture())
    write(tmp_path / "b.png", picture())
    ended = vlmbatch("run", tmp_path / "a.csv", "-t", "detect", *echo(), "-o", tmp_path / "out")
    assert ended.exit_code in (0, 3), ended
    asked = read_results(tmp_path / "out")["question"].to_pylist()
    assert asked == ['["x, y", "z"]', '["x", "y"]']


def test_a_list_of_questions_in_a_cell(tmp_path):
    write(tmp_path / "a.png", picture())
    cells = 'image,questions\na.png,"[""x?"", ""y?""]"\na.png,[broken\n'
    path = write(tmp_path / "a.csv", cells)
    ended = vlmbatch("run", path, "-t", "vqa", *echo(), "-o", tmp_path / "out")
    assert ended.exit_code == 0, ended
    assert read_results(tmp_path / "out")["question"].to_pylist() == ["x?", "y?", "[broken"]


def test_separators_and_byte_order_marks(tmp_path):
    for name, content in {
        "bom.csv": b"\xef\xbb\xbfimage,n\r\na.png,1\r\n",
        "semicolon.csv": b"image;n\na.png;1\n",
        "tab.tsv": b"image\tn\na.png\t1",
        "blank.csv": b"\n\nimage,n\n\n\na.png,1\n\n",
        "quoted.csv": b'"image", n \n"a.png",1\n',
        "index.csv": b",image,n\n0,a.png,1\n",
    }.items():
        rows = rows_of(write(tmp_path / name, content), wanted=["n"])
        assert [(row.images[0].uri, row.fields["n"]) for row in rows] == [("a.png", "1")], name


def test_records_that_do_not_fit_the_header_are_bad_rows(tmp_path):
    path = write(tmp_path / "a.csv", b"image,n\na.png,1,2\na.png\n\xff.png,1\na\rb,1\na.png,4\n")
    assert problems(path, "n") == [
        "the record has 3 cells, and the header 2",
        None,
        "the record is no UTF-8 text",
        "the record has a carriage return outside of quotes",
        None,
    ]


def test_a_quote_that_is_still_open_at_the_end_is_a_bad_row(tmp_path):
    path = write(tmp_path / "a.csv", 'image,n\na.png,1\nb.png,"2\nc.png,3\nd.png,4\n')
    said = "opens a quote that is never closed, so that all to the end of the file belongs to it"
    assert problems(path, "n") == [None, f"the record {said}: 3 lines"]
    assert said in refused(write(tmp_path / "b.csv", '"image,n\na.png,1\n')).message


def test_headers_that_are_refused(tmp_path):
    assert (
        "names 'image' more than once"
        in refused(write(tmp_path / "a.csv", "image,image\n")).message
    )
    assert "it is empty" in refused(write(tmp_path / "b.csv", "")).message
    assert "it is empty" in refused(write(tmp_path / "c.csv", "\n\n")).message
    assert "no header" in refused(write(tmp_path / "d.csv", b"\0" * 99)).message
    assert "UTF-16" in refused(write(tmp_path / "e.csv", "image,n\nä,1".encode("utf-16"))).message
    assert open_manifest([write(tmp_path / "f.csv", "image,n\n")]).rows == 0
    path = write(tmp_path / "g.csv", "url,n\na.png,1\n")
    with pytest.raises(ManifestError, match=r"no column 'image' in here \(it has: url, n\)"):
        stream(open_manifest([path]))


# giants

PEAK = """
    import resource, sys
    from vlmbatch.manifest import RowStream, open_manifest
    from vlmbatch.manifest.columns import choose_columns
    from vlmbatch.records import Range
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = open_manifest([sys.argv[1]])
    rows = RowStream(manifest, choose_columns(manifest.schema, {}, (), where=""))
    for row in rows.rows(Range(0, manifest.rows)):
        print(row.row, row.problem)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_of_half_a_gigabyte_is_a_bad_row_that_nobody_holds(name, tmp_path):
    first, last = ('{"image": "a"}', '{"image": "b"}') if name == "a.jsonl" else ("image\na", "b")
    with (tmp_path / name).open("wb") as file:
        file.write(f"{first}\n".encode())
        file.seek(2**29, 1)  # a hole of zeros
        file.write(f"\n{last}\n".encode())
    words = [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / name)]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    what = "line is" if name == "a.jsonl" else "record has a line"
    assert found[:3] == ["0 None", f"1 the {what} longer than 64 MiB", "2 None"]
    assert int(found[3]) < 300, "MiB"


def test_a_quote_that_is_never_closed_ends_at_its_limit(tmp_path):
    lines = [b"image,n", b'a.png,"open', *([b"x" * 2**20 + b",1"] * 70), b"b.png,2"]
    found = problems(write(tmp_path / "a.csv", b"\n".join(lines)))
    assert found[0] == "the record has a cell longer than 64 MiB"
    assert found[-1] is None
    assert len(list(stream(open_manifest([str(tmp_path / "a.csv")])).rows(Range(1, 3)))) == 2
