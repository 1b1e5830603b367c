"""The libraries that read boxes, installed from pip's index, read what was exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.exports.boxed import Boxed, boxed
from tests.harness import vlmbatch
from vlmbatch.grounding import Box

pytestmark = [pytest.mark.consumers, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
TORCHVISION = ROOT / ".torchvision"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Boxed:
    return boxed(tmp_path_factory.mktemp("run") / "in")


def exported(run: Boxed, place: Path, form: str, *options: str) -> Path:
    done = vlmbatch("export", run.folder, place, "--to", form, *options)
    assert done.exit_code == 0, done
    return place


def environment_with(folder: Path, *packages: str) -> Path:
    """The interpreter of a new environment; skips where pip reaches no index."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    installed(python, *packages)
    return python


def beside(folder: Path, *packages: str) -> dict[str, str]:
    """Variables with which this interpreter finds the packages, too; they bring nothing along."""
    words = ("--no-deps", "-c", str(CONSTRAINTS), "--target", str(folder))
    installed(Path(sys.executable), *words, *packages)
    return {"PYTHONPATH": str(folder)}


def installed(python: Path, *options: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *options],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"pip cannot install {options}: {done.stderr[-300:]}")


def told(python: Path | str, code: str, *args: Path, **variables: str) -> Any:
    """What a script prints as JSON in its last line."""
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code, *args],
        env={**os.environ, "PYTHONPATH": "", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sizes_to_boxes(run: Boxed) -> dict[str, list[Box]]:
    """What is wanted, by the size of the image: no two have the same."""
    return {
        f"{size.width}x{size.height}": run.boxes[colour]
        for colour, size in run.sizes.items()
        if colour in run.boxes
    }


def assert_same(found: dict[str, list[list[Any]]], wanted: dict[str, list[Box]]) -> None:
    """``found``: label and edges in pixels."""
    assert {size: [label for label, *_ in boxes] for size, boxes in found.items()} == {
        size: [box.label for box in boxes] for size, boxes in wanted.items()
    }
    for size, boxes in wanted.items():
        for (_, *place), box in zip(found[size], boxes, strict=True):
            assert place == pytest.approx([box.x1, box.y1, box.x2, box.y2], abs=0.02)


SUPERVISION = """
import json, sys
import supervision
folder, form = sys.argv[1:]
if form == "yolo":
    places = [f"{folder}/images/train", f"{folder}/labels/train", f"{folder}/data.yaml"]
    found = supervision.DetectionDataset.from_yolo(*places)
else:
    found = supervision.DetectionDataset.from_coco(folder, f"{folder}/instances_train.json")
print(json.dumps({
    f"{image.shape[1]}x{image.shape[0]}": [
        [found.classes[label], *box]
        for label, box in zip(boxes.class_id.tolist(), boxes.xyxy.tolist())
    ]
    for _, image, boxes in found
}))
"""


def test_supervision_reads_coco_and_yolo(run: Boxed, tmp_path: Path) -> None:
    python = environment_with(tmp_path / "venv", "supervision")
    for form in ("coco", "yolo"):
        place = exported(run, tmp_path / form, form)
        assert_same(told(python, SUPERVISION, place, Path(form)), sizes_to_boxes(run))


ULTRALYTICS = """
import json, os, sys
from ultralytics.data.utils import check_det_dataset, img2label_paths, verify_image_label
data = check_det_dataset(sys.argv[1], autodownload=False)
images = sorted(os.path.join(data["train"], name) for name in os.listdir(data["train"]))
found = {}
for image, label in zip(images, img2label_paths(images)):
    asked = (image, label, "", False, data["nc"], 0, 0, False)
    _, lines, shape, *_, message = verify_image_label(asked)
    if lines is None:
        assert "<10 pixels" in message, message
        continue
    height, width = shape
    found[f"{width}x{height}"] = [
        [data["names"][int(c)], (x - w / 2) * width, (y - h / 2) * height,
         (x + w / 2) * width, (y + h / 2) * height]
        for c, x, y, w, h in lines.tolist()
    ]
print(json.dumps(found))
"""


def test_ultralytics_takes_every_image_that_is_large_enough_for_it(
    run: Boxed, tmp_path: Path
) -> None:
    """It leaves out images with a side of fewer than 10 pixels."""
    if not TORCHVISION.exists():
        pytest.skip("torchvision is missing: make torchvision")
    needs = ("ultralytics", "opencv-python-headless", "matplotlib")
    variables = beside(tmp_path / "site", *needs, "pyparsing", "cycler", "kiwisolver")
    paths = [variables["PYTHONPATH"], str(ROOT / "tests" / "torchvision_site"), str(TORCHVISION)]
    place = exported(run, tmp_path / "yolo", "yolo")
    found = told(
        sys.executable,
        ULTRALYTICS,
        place / "data.yaml",
        PYTHONPATH=os.pathsep.join(paths),
        YOLO_CONFIG_DIR=str(tmp_path / "config"),
    )
    wanted = sizes_to_boxes(run)
    assert set(wanted) - set(found) == {"1x1", "64x3"}
    assert_same(found, {size: wanted[size] for size in found})


FIFTYONE = """
import json, sys
from PIL import Image
from fiftyone.utils.coco import COCODetectionDatasetImporter
from fiftyone.utils.data.importers import FiftyOneImageDetectionDatasetImporter
places = json.loads(sys.argv[1])
importers = [
    FiftyOneImageDetectionDatasetImporter(dataset_dir=places["copied"]),
    FiftyOneImageDetectionDatasetImporter(dataset_dir=places["named"]),
    COCODetectionDatasetImporter(
        data_path=places["coco"], labels_path=places["coco"] + "/instances_train.json"
    ),
]
all_found = []
for importer in importers:
    found = {}
    with importer:
        for path, _, labels in importer:
            if isinstance(labels, dict):
                labels = labels.get("detections")  # none at all for an image without any
            with Image.open(path) as image:
                width, height = image.size
            boxes = found.setdefault(f"{width}x{height}", [])
            for each in labels.detections if labels else []:
                x, y, w, h = each.bounding_box
                boxes.append([each.label, x * width, y * height, (x + w) * width, (y + h) * height])
    all_found.append(found)
print(json.dumps(all_found))
"""


def test_fiftyone_imports_its_own_form_and_coco(run: Boxed, tmp_path: Path) -> None:
    """By its importers, which need no database."""
    python = environment_with(tmp_path / "venv", "fiftyone")
    places = {
        "copied": str(exported(run, tmp_path / "copied", "fiftyone") / "train"),
        "named": str(exported(run, tmp_path / "named", "fiftyone", "--images=reference") / "train"),
        "coco": str(exported(run, tmp_path / "coco", "coco")),
    }
    found = told(python, FIFTYONE, Path(json.dumps(places)), HOME=str(tmp_path))
    for each in found:
        assert_same(each, sizes_to_boxes(run))


LABEL_STUDIO = """
import json, sys
from label_studio_sdk.label_interface import LabelInterface
folder = sys.argv[1]
interface = LabelInterface(open(f"{folder}/labeling_config.xml", encoding="utf-8").read())
interface.validate()
tasks = json.load(open(f"{folder}/tasks_train.json", encoding="utf-8"))
print(json.dumps([
    (len(p["result"]), interface.validate_prediction(p, return_errors=True))
    for task in tasks for p in task["predictions"]
]))
"""


def test_label_studio_accepts_configuration_and_predictions(run: Boxed, tmp_path: Path) -> None:
    python = environment_with(tmp_path / "venv", "label-studio-sdk")
    place = exported(run, tmp_path / "out", "label-studio")
    found = told(python, LABEL_STUDIO, place)
    assert found == [[1, []], [3, []], [1, []], [0, []], [2, []], [1, []]]  # as rows are complete
    config = place / "labeling_config.xml"
    config.write_text(config.read_text().replace('"cat"', '"dog"'))
    assert any(errors for _, errors in told(python, LABEL_STUDIO, place))


MS_SWIFT = """
import json, sys
from PIL import Image
from swift.dataset import load_dataset
from swift.template.template_inputs import StdTemplateInputs
from swift.template.templates.qwen import Qwen2_5VLTemplate, Qwen3VLTemplate
rows, _ = load_dataset([sys.argv[1]], strict=True)
found = {}
for kind in (Qwen3VLTemplate, Qwen2_5VLTemplate):
    template = object.__new__(kind)  # without a model's processor, which boxes do not need
    template.bbox_format = "new"
    for row in rows:
        inputs = StdTemplateInputs.from_dict(row)
        inputs.images = [Image.open(image["path"]) for image in inputs.images]
        template._get_height_width(inputs)
        template.normalize_bbox(inputs)
        text = inputs.messages[-1]["content"]
        for i, box in enumerate(inputs.objects["bbox"]):
            text = text.replace("<bbox>", "".join(template.replace_bbox(box, i, inputs)), 1)
        for i, ref in enumerate(inputs.objects["ref"]):
            text = text.replace("<ref-object>", "".join(template.replace_ref(ref, i, inputs)), 1)
        found.setdefault(kind.__name__, []).append(text)
print(json.dumps(found))
"""


def test_ms_swift_puts_boxes_into_the_space_of_each_model(run: Boxed, tmp_path: Path) -> None:
    """By its own loader and templates: for Qwen3-VL, exactly what the model had said."""
    needs = ("ms-swift", "modelscope", "modelscope_hub", "cryptography", "cffi", "peft")
    variables = beside(tmp_path / "site", *needs, "accelerate", "json_repair")
    place = exported(run, tmp_path / "out", "ms-swift")
    caches = {name: str(tmp_path / name) for name in ("HF_HOME", "MODELSCOPE_CACHE")}
    found = told(sys.executable, MS_SWIFT, place / "train.jsonl", **variables, **caches)
    asked = [row for row in run.rows if row["task"] == "detect"]

    def items(text: str) -> Any:
        return json.loads(text.removeprefix("```json\n").removesuffix("\n```"))

    assert list(map(items, found["Qwen3VLTemplate"])) == [items(row["raw"]) for row in asked]
    for text, row in zip(found["Qwen2_5VLTemplate"], asked, strict=True):
        boxes = [item["bbox_2d"] for item in items(text) if "bbox_2d" in item]
        assert boxes == [[round(b[edge]) for edge in EDGES] for b in row["boxes"]]


EDGES = ("x1", "y1", "x2", "y2")
