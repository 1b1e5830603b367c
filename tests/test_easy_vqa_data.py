from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from tests.easy_vqa_data import easy_vqa_images, questions, truth, write_manifest


def test_the_test_split_is_what_the_documents_say() -> None:
    known = truth("test").values()
    assert len(questions("test")) == 9673
    assert len(easy_vqa_images("test")) == len(known) == 1000
    assert Counter(t.colour for t in known if t.colour) == {
        "red": 100, "yellow": 95, "blue": 96, "brown": 100,
        "green": 99, "black": 99, "teal": 92, "gray": 109,
    }  # fmt: skip
    assert sum(t.colour is not None for t in known) == 790
    assert sum(t.caption is not None for t in known) == 603


def test_boxes_hold_the_shape_and_little_else() -> None:
    for image, known in list(truth("test").items())[:50]:
        x1, y1, x2, y2 = known.box
        assert 5 <= x2 - x1 <= 32
        assert 5 <= y2 - y1 <= 32
        with Image.open(easy_vqa_images("test")[image]) as picture:
            ground = picture.getpixel((0, 0))
            assert picture.getpixel(((x1 + x2) // 2, (y1 + y2) // 2)) != ground


def test_a_manifest_names_real_files_and_begins_again_after_the_last(tmp_path: Path) -> None:
    table = pq.read_table(write_manifest(tmp_path / "m.parquet", rows=1002, with_questions=True))
    assert table.column_names == ["image", "id", "questions"]
    first, *_, last = table.to_pylist()
    assert Path(first["image"]).is_file()
    assert first["questions"][0] == "what is the red shape?"
    assert last["image"] == str(easy_vqa_images("test")[1])
    assert len(set(table["id"].to_pylist())) == 1002
