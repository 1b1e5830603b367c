"""Any manifest as row ranges, and the rows of a range, streamed."""

from vlmbatch.manifest.columns import Columns
from vlmbatch.manifest.parquet import Manifest, ManifestFile, RowStream, open_manifest

__all__ = ["Columns", "Manifest", "ManifestFile", "RowStream", "open_manifest"]
