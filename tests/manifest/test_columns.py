"""Which columns mean what; how a record becomes a row; what a row's default id depends on."""

from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from vlmbatch.errors import ManifestError, UsageError
from vlmbatch.manifest.columns import Columns, choose_columns, default_id, row_of
from vlmbatch.records import ImageRef
from vlmbatch.storage import UNCHANGED, check_names_object, joined, without_secrets

HF = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def chosen(schema: dict[str, pa.DataType], given=None, wanted=()) -> Columns:
    return choose_columns(pa.schema(schema), given or {}, wanted, where="photos.parquet")


def refused(schema: dict[str, pa.DataType], given=None, wanted=()) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        chosen(schema, given, wanted)
    assert caught.value.exit_code == 2
    return caught.value


def row(image, columns: Columns | None = None, **fields):
    columns = columns or chosen({"image": pa.string(), **dict.fromkeys(fields, pa.string())})
    return row_of({columns.names["image"]: image, **fields}, 3, columns)


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        HF,
        pa.struct([("path", pa.string())]),
        pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.string()),
        pa.large_list(HF),
        pa.list_(pa.binary(), 2),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
    ],
    ids=str,
)
def test_these_types_are_images(kind):
    assert chosen({"image": kind}).to_read == ["image"]


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.list_(pa.int8()), pa.struct([("x", pa.binary())]), pa.null()], ids=str
)
def test_other_types_are_no_images_and_the_error_says_what_was_found(kind):
    error = refused({"image": kind})
    assert error.message == f"column 'image' in photos.parquet holds {kind}, not images"
    assert "bytes" in error.hint


def test_a_missing_image_column_is_named_with_those_there_are_and_the_option():
    error = refused({"url": pa.string(), "id": pa.int64()})
    assert error.message == "no column 'image' in photos.parquet (it has: url, id)"
    assert error.hint == "name the column with --column image=url"
    assert refused({"n": pa.int8(), "shot": pa.binary()}).hint.endswith("image=shot")
    assert refused({"n": pa.int8()}).hint.endswith("image=NAME")
    assert "no columns" in refused({}).message


@pytest.mark.parametrize("ours", ["question", "questions", "phrase", "labels"])
def test_what_is_asked_is_text(ours):
    error = refused({"image": pa.string(), ours: pa.int64()})
    assert error.message == (
        f"column {ours!r} in photos.parquet holds int64; {ours!r} is text or a list of texts"
    )
    assert error.hint == f"name another column with --column {ours}=NAME"
    for kind in (pa.string(), pa.list_(pa.large_string()), pa.dictionary(pa.int8(), pa.string())):
        assert ours in chosen({"image": pa.string(), ours: kind}).fields


def test_a_column_that_was_asked_for_and_is_missing_is_named():
    schema = {"image": pa.string(), "question_en": pa.string()}
    error = refused(schema, given={"question": "question_em"})
    assert error.message == (
        "no column 'question_em' in photos.parquet (it has: image, question_en)"
    )
    assert "--column question=question_em" in error.hint
    assert "did you mean 'question_en'?" in error.hint
    assert "no column 'shop'" in refused(schema, wanted=["shop"]).message
    assert "cannot rename 'answer'" in refused(schema, given={"answer": "image"}).message


def test_columns_are_renamed_and_both_names_can_be_used():
    schema = {"url": pa.string(), "q": pa.string(), "key": pa.int64(), "shop": pa.string()}
    given = {"image": "url", "question": "q", "id": "key"}
    columns = chosen(schema, given, wanted=["shop"])
    assert sorted(columns.to_read) == sorted(schema)
    found = row_of({"url": "a.png", "q": "why?", "key": 7, "shop": "s"}, 3, columns)
    assert found.images == (ImageRef(uri="a.png"),)
    assert (found.row, found.id, found.problem) == (3, "7", None)
    assert found.fields == {"q": "why?", "question": "why?", "shop": "s"}


def test_only_what_is_needed_is_read():
    schema = {"image": pa.string(), "id": pa.string(), "heavy": pa.binary(), "labels": pa.string()}
    assert chosen(schema).to_read == ["image", "labels", "id"]


def test_images_in_each_form():
    assert row("a.png").images == (ImageRef(uri="a.png"),)
    assert row(b"png").images == (ImageRef(data=b"png"),)
    assert row({"bytes": b"png", "path": "a.png"}).images == (ImageRef("a.png", b"png"),)
    assert row({"bytes": b"png", "path": None}).images == (ImageRef(data=b"png"),)
    assert row({"bytes": None, "path": "a.png"}).images == (ImageRef(uri="a.png"),)
    assert row(["a.png", b"png"]).images == (ImageRef(uri="a.png"), ImageRef(data=b"png"))


@pytest.mark.parametrize("image", ["", {"bytes": None, "path": None}, {"bytes": None}, {}])
def test_an_image_that_is_none_is_the_rows_problem(image):
    assert row(image).problem == "the image is empty"
    assert row(["a.png", image]).problem == "image 1 of 2 is empty"
    assert row(["a.png", None]).problem == "image 1 of 2 is null"
    assert row(None).problem == "the image is null"
    assert row([]).problem == "the image list is empty"


def test_an_id_of_any_type_becomes_text_and_a_null_one_the_default():
    columns = chosen({"image": pa.string(), "id": pa.int64()})
    assert row_of({"image": "a.png", "id": 0}, 0, columns).id == "0"
    without = row_of({"image": "a.png", "id": None}, 0, columns)
    assert without.id == row("a.png").id


def test_the_default_id_never_changes():
    """Ids are in users' tables: whoever changes these values breaks joins."""
    assert default_id([ImageRef(uri="a.png")], {}) == "4ab4bf181b95d330dab7dc73242d36ce"
    fields = {"question": "why?", "phrase": "dot", "labels": ["a", "b"]}
    assert (
        default_id([ImageRef(data=b"png"), ImageRef(uri="b.png")], fields)
        == "57d9eb3512355ca709c005cb062956c4"
    )


def test_the_default_id_depends_on_images_and_on_what_is_asked():
    ids = [
        default_id([ImageRef(uri="a.png")], {}),
        default_id([ImageRef(uri="b.png")], {}),
        default_id([ImageRef(uri="a.png"), ImageRef(uri="b.png")], {}),
        default_id([ImageRef(data=b"png")], {}),
        default_id([ImageRef(uri="a.png")], {"question": "x"}),
        default_id([ImageRef(uri="a.png")], {"question": "y"}),
        default_id([ImageRef(uri="a.png")], {"questions": ["x", "y"]}),
        default_id([ImageRef(uri="a.png")], {"questions": ["xy"]}),
        default_id([ImageRef(uri="a.png")], {"phrase": "x"}),
        default_id([ImageRef(uri="a.png")], {"question": "x", "phrase": "y"}),
        default_id([ImageRef(uri="a.png")], {"labels": ["a", "b"]}),
        default_id([ImageRef(uri="a.png")], {"labels": ["ab"]}),
        default_id([ImageRef(uri="a.png")], {"labels": "a,b"}),
    ]
    assert len(set(ids)) == len(ids)


def test_the_default_id_does_not_depend_on_the_rest():
    plain = default_id([ImageRef(uri="https://x.org/a.png")], {"question": "x"})
    signed = ImageRef(uri="https://user:secret@x.org/a.png?X-Signature=1&Expires=2#top")
    assert default_id([signed], {"question": "x"}) == plain
    assert default_id([signed], {"question": "x", "shop": "s", "phrase": None}) == plain
    with_path = ImageRef(uri="cache/a.png", data=b"png")
    assert default_id([with_path], {}) == default_id([ImageRef(data=b"png")], {})


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("photos/a.png", "photos/a.png"),
        ("what?.png", "what?.png"),
        ("https://u:p@x.org/a.png?k=v#f", "https://x.org/a.png"),
        ("s3://key:secret@bucket/a b.png", "s3://bucket/a b.png"),
        ("s3://key:sec/ret@bucket/a@b.png", "s3://bucket/a@b.png"),
        ("s3://arn:aws:s3:eu:1:accesspoint/x/a@b", "s3://arn:aws:s3:eu:1:accesspoint/x/a@b"),
        ("oci://bucket@space/a.png?sig=1", "oci://bucket@space/a.png"),
        ("https://u:p@x.org/a.png?k=v::https://y.org/b", "https://x.org/a.png"),
        ("https://u:p@[::1/a?secret", "https://[::1/a"),
        ("s3://bucket/a#1?.png", "s3://bucket/a#1?.png"),
        ("S3://bucket/a\n.png#page=2", "s3://bucket/a\n.png#page=2"),
        ("az://box/a#1.tiff?sv=1&sig=secret#page=2", "az://box/a#1.tiff#page=2"),
        ("abfs://box@account/a?&sig=secret", "abfs://box@account/a"),
        ("zip://a#1?.png::photos.zip", "zip://a#1?.png::photos.zip"),
        ("zip://a#1.png::https://u:p@x.org/a.zip?k=v", "zip://a#1.png::https://x.org/a.zip"),
        ("data:image/png;base64,AAAA", "data:image/png;base64"),
    ],
)
def test_references_without_secrets(uri, shown):
    assert without_secrets(uri) == shown


@examples(max_examples=200)
@given(st.text(max_size=30))
def test_no_text_breaks_a_reference(text):
    for uri in (text, f"https://{text}", f"https://u:secret@{text}", f"s3://{text}?secret"):
        shown = without_secrets(uri)
        assert shown == without_secrets(shown)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("../p/1.jpg", "s3://b/p/1.jpg"),
        ("./1.jpg", "s3://b/m/1.jpg"),
        ("sub/../1.jpg", "s3://b/m/1.jpg"),
        ("a//b.jpg", "s3://b/m/a//b.jpg"),
        ("../../../1.jpg", "s3://b/1.jpg"),
    ],
)
def test_relative_names_are_steps_that_stay_in_the_bucket(name, meant):
    assert joined("s3://b/m/", name) == meant
    assert joined("https://h", "../1.jpg") == "https://h/1.jpg"


@pytest.mark.parametrize("uri", ["s3://k:s/x@b/1.jpg", "s3://k@b/1.jpg", "s3://b", "s3:///1.jpg"])
def test_what_names_no_object_is_refused(uri):
    with pytest.raises(UsageError):
        check_names_object(uri)


@pytest.mark.parametrize(
    "uri", ["oci://b@space/1.jpg", "dbfs:///1.jpg", "az://b/run@v2", "gdrive://1"]
)
def test_other_ways_to_name_an_object_are_not(uri):
    check_names_object(uri)


VALUES = st.recursive(
    st.none() | st.text(max_size=5) | st.binary(max_size=5) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["bytes", "path", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@examples(max_examples=200)
@given(VALUES, VALUES)
def test_a_row_comes_of_any_record(image, asked):
    found = row(image, chosen({"image": pa.string(), "question": pa.string()}), question=asked)
    assert found.images or found.problem
    assert len(found.id) == 32


def test_names_that_differ_behind_a_hash_or_question_mark_have_ids_of_their_own() -> None:
    for uri in ("s3://bucket/photo #{}.jpg", "s3://bucket/why?{}.jpg", "tar://a#{}.jpg::b.tar"):
        first, second = (default_id([ImageRef(uri=uri.format(n))], {}) for n in (1, 2))
        assert first != second, uri


def test_pictures_inside_data_uris_have_ids_of_their_own() -> None:
    first, second = (default_id([ImageRef(uri=f"data:image/png;base64,{c}")], {}) for c in "AB")
    assert first != second


@examples(max_examples=300)
@given(st.from_regex(rf"\A(?:{UNCHANGED})\Z"))
def test_what_is_passed_by_as_unchanged_is_what_splitting_leaves(uri):
    parts = urlsplit(uri)
    if "://" in uri and not uri.startswith("data:"):
        rebuilt = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        assert without_secrets(uri) == uri == rebuilt
