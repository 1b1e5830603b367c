"""``python -m vlmbatch.schemas FOLDER``: the contracts as files, generated from the code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vlmbatch.job import JobSpec
from vlmbatch.manifest.columns import ASKED
from vlmbatch.results.schema import RESULT_SCHEMA, SCHEMA_VERSION

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def contracts() -> dict[str, str]:
    """File name: content."""
    return {
        "job.schema.json": _json(_job_schema()),
        "manifest.schema.json": _json(_manifest_schema()),
        "results.arrow.txt": _results_text(),
    }


def _job_schema() -> dict[str, Any]:
    return {"$schema": _DIALECT, **JobSpec.model_json_schema(), "title": "vlmbatch job spec"}


def _manifest_schema() -> dict[str, Any]:
    """One manifest row as JSON. Parquet types map as usual; bytes have no JSON form."""
    image = {
        "anyOf": [
            {
                "type": "string",
                "description": "path (relative to the manifest), or URI: s3:, https:, data:, ...",
            },
            {
                "type": "object",
                "description": "Hugging Face image struct; in Parquet, bytes may stand alone too",
                "properties": {"bytes": {}, "path": {"type": ["string", "null"]}},
            },
        ]
    }
    text = {"type": ["string", "null"]}
    texts = {"anyOf": [text, {"type": "array", "items": text}]}
    properties: dict[str, Any] = {
        "image": {"anyOf": [image, {"type": "array", "items": image}]},
        "id": {"type": ["string", "integer", "null"]},
    }
    properties.update(dict.fromkeys(ASKED, texts))
    return {
        "$schema": _DIALECT,
        "title": "vlmbatch manifest row",
        "type": "object",
        "properties": properties,
        "required": ["image"],
        "additionalProperties": True,
    }


def _results_text() -> str:
    lines = [f"# result columns, version {SCHEMA_VERSION}; --carry appends the manifest's columns"]
    for field in RESULT_SCHEMA:
        lines.append(f"{field.name}: {field.type}{'' if field.nullable else ' not null'}")
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "schemas")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contracts().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
