"""What users take out of an output: ``vlmbatch export OUTPUT --to FORMAT DEST``."""

from __future__ import annotations

FORMATS = {
    "trl": "trl",
    "llava": "llava",
    "sharegpt": "sharegpt",
    "axolotl": "axolotl",
    "jsonl": "jsonl",
    "captions": "captions",
    "imagefolder": "imagefolder",
    "webdataset": "webdataset",
    "hub": "hub",
}
"""Training data, by the name of its form: a module of this package, imported when asked, whose
``FORMAT`` is the class (base.Format). Other packages' stand under the entry point group
``vlmbatch.exports`` (own.py)."""
