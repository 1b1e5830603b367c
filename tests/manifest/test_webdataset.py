"""Tars as WebDataset writes them: samples, siblings, odd members, damage."""

import tarfile

import pytest

from tests.harness import picture
from tests.manifest import formats
from tests.manifest.formats import add, rows_of, stream
from vlmbatch.errors import ManifestError
from vlmbatch.manifest import open_manifest
from vlmbatch.records import Range


def tar_of(path, members: list[tuple[str, bytes]], **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def test_siblings_become_fields(tmp_path):
    path = tar_of(
        tmp_path / "a.tar",
        [
            ("x/001.jpg", b"jpg"),
            ("x/001.json", b'{"place": "Ulm", "size": {"w": 1}, "id": 5, "image": "no"}'),
            ("x/001.txt", "eine Straße\n".encode()),
            ("x/001.cls", b"7"),
            ("x/001.npy", b"passed over"),
            ("x/002.PNG", b"png"),
            ("x/.003.jpg", b"hidden"),
            ("y/002.left.jpg", b"1"),
            ("y/002.right.jpg", b"2"),
            ("z.txt", b"no image"),
        ],
    )
    rows = rows_of(path, wanted=["place", "size", "txt", "cls", "__key__"])
    assert [row.id for row in rows] == ["x/001", "x/002", "y/002", "z"]
    assert [[(i.uri, i.data) for i in row.images] for row in rows] == [
        [("x/001.jpg", b"jpg")],
        [("x/002.PNG", b"png")],
        [("y/002.left.jpg", b"1"), ("y/002.right.jpg", b"2")],
        [],
    ]
    assert dict(rows[0].fields) == {
        "place": "Ulm",
        "size": {"w": 1},
        "txt": "eine Straße",
        "cls": "7",
        "__key__": "x/001",
    }
    assert [row.problem for row in rows] == [None, None, None, "the image is null"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_and_long_names(format, tmp_path):
    long = "f" * 90 + "/" + "n" * (90 if format == tarfile.USTAR_FORMAT else 300)
    members = [(f"{long}{n}.png", picture(n + 1)) for n in range(130)]
    path = tar_of(tmp_path / "a.tar", members, format=format)
    manifest = open_manifest([str(path)])
    assert manifest.files[0].starts == (0, 64, 128)
    found = list(stream(manifest).rows(Range(127, 130)))
    assert [(row.images[0].uri, row.images[0].data) for row in found] == members[127:]


def test_a_link_in_place_of_a_member_is_a_bad_row(tmp_path):
    path = tar_of(tmp_path / "a.tar", [("1.jpg", b"x")])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("2.jpg", tarfile.LNKTYPE), ("3.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "1.jpg"
            tar.addfile(link)
        add(tar, "4.jpg", b"y")
        link = tarfile.TarInfo("4.npy")  # of a kind that is passed over
        link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
        tar.addfile(link)
    rows = rows_of(path)
    assert [row.id for row in rows] == ["1", "2", "3", "4"]
    said = "is a link to 1.jpg, which has no bytes of its own"
    assert [said in (row.problem or "") for row in rows] == [False, True, True, False]


def test_what_is_compressed_or_a_zip_is_refused_with_what_to_do(tmp_path):
    for name, head, said in (
        ("a.tar", b"\x1f\x8b", "it is compressed (gzip)"),
        ("a.tar.gz", b"\x1f\x8b", "it is compressed (gzip)"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd", "it is compressed (Zstandard)"),
        ("a.zip", b"PK\3\4", "it is a zip archive"),
    ):
        (tmp_path / name).write_bytes(head + bytes(2000))
        with pytest.raises(ManifestError) as caught:
            open_manifest([str(tmp_path / name)])
        assert caught.value.message.endswith(said), name
        assert "unpack" in caught.value.hint or "decompress" in caught.value.hint


def test_texts_that_are_broken_are_bad_rows(tmp_path):
    path = tar_of(
        tmp_path / "a.tar",
        [
            *[("1.jpg", b"x"), ("1.json", b"{"), ("2.jpg", b"x"), ("2.txt", b"\xff")],
            *[("3.jpg", b"x"), ("3.json", b'{"n": 1}'), ("4.jpg", b"")],
        ],
    )
    rows = rows_of(path, wanted=["n"])
    assert [row.id for row in rows] == ["1", "2", "3", "4"]
    assert str(rows[0].problem).startswith("1.json is no JSON")
    assert rows[1].problem == "2.txt is no UTF-8 text"
    assert rows[2].problem is None
    assert rows[2].fields["n"] == 1


def test_a_tar_that_is_cut_or_damaged_is_refused_with_the_place(tmp_path):
    path = tmp_path / "a.tar"
    formats.write_tar(path, range(50))
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:512] + b"x" * 4096 + data[5000:]):
        path.write_bytes(broken)
        with pytest.raises(ManifestError, match=r"a\.tar"):
            open_manifest([str(path)])
    path.write_bytes(b"no tar at all" * 99)
    with pytest.raises(ManifestError, match=r"cannot read .*a\.tar"):
        open_manifest([str(path)])


def test_planning_does_not_read_the_images(tmp_path):
    """A sparse tar of 20 GB is planned at once."""
    path = tmp_path / "big.tar"
    with path.open("wb") as file:
        for n in range(20):
            member = tarfile.TarInfo(f"{n}.jpg")
            member.size = 2**30
            file.write(member.tobuf())
            file.seek(2**30, 1)
        file.write(bytes(1024))
    assert open_manifest([str(path)]).rows == 20
