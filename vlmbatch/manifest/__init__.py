"""Any manifest as row ranges, and the rows of a range, streamed."""

from vlmbatch.manifest.columns import Columns
from vlmbatch.manifest.files import ManifestFile
from vlmbatch.manifest.manifest import Manifest, RowStream, open_manifest

__all__ = ["Columns", "Manifest", "ManifestFile", "RowStream", "open_manifest"]
