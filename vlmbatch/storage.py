"""Files wherever they are: local paths and the object stores that fsspec knows, in our words.

Credentials, endpoints and timeouts come from the environment of each process: the store's own
variables (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...) and fsspec's (``FSSPEC_S3=...``); never
from a job.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
from abc import abstractmethod
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from vlmbatch.errors import CredentialsRefused, UsageError

_SCHEME = re.compile(r"(?:file|data)(?=:)|[a-z][a-z0-9+.-]*(?=://|::)", re.IGNORECASE)
PAGE = re.compile(r"#page=([0-9]{1,6})$")
"""The end of a URI that means one page of a document, counted from 1."""
UNCHANGED = (  # by without_secrets: nothing in it that is secret, or that urlsplit writes otherwise
    r"[^:]*|[a-z][a-z0-9+.-]*://[A-Za-z0-9_.-]+(?::[0-9]+)?(?:/[^?#:\t\r\n]*)?"
)
_UNCHANGED = re.compile(UNCHANGED)
_CHAINED = re.compile(r"::(?=[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_QUERY = re.compile(r"\?[A-Za-z0-9._~%+&;-]+=.*", re.DOTALL)
_USER_INFO = re.compile(r"(?<=://)[^/?#]*@")
_KEYS = r"(?!arn:)[^/:@]+:[^@]*@"
"""A key and its secret before a bucket; secrets may have slashes."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "az": "azure"}
EXTRAS |= {"abfss": "azure", "adl": "azure", "hf": "hub"}
"""Which extra of this package brings the library of a scheme."""
STORES = frozenset(
    (
        *("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf"),
        *("oss", "oci", "ocilake", "obs", "tos", "lakefs", "dbfs", "gdrive", "box", "dropbox"),
    )
)
"""Schemes whose host is settled by the environment. Those that name one of their own (``ftp:``,
``sftp:``, ``smb:``, ...) or reach local files would go around the guards of images."""
_CONTAINED = frozenset(("az", "abfs", "abfss", "adl", "oci", "ocilake"))
"""Stores whose addresses may be ``container@place``."""


class RangedFile(io.RawIOBase):
    """A seekable file of ``size`` bytes whose bytes come from elsewhere, by ranges."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._at = 0

    @abstractmethod
    def bytes_of(self, first: int, stop: int) -> bytes:
        """All of these; ``stop`` is within the file."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """So many bytes; fewer only at the end."""
        first = self._at
        stop = self.size if size is None or size < 0 else min(self.size, first + size)
        if first >= stop:
            return b""
        data = self.bytes_of(first, stop)
        self._at = stop
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def scheme_of(uri: str) -> str | None:
    """Lower case; None for a path. ``scan:12.png`` is a path, for want of ``//``."""
    match = _SCHEME.match(uri)
    return match.group().lower() if match else None


def with_plain_scheme(uri: str) -> str:
    """``S3://`` is ``s3://``, which no library of a store knows."""
    scheme = scheme_of(uri)
    if scheme is None or uri.startswith(scheme):  # never a copy of a data: URI
        return uri
    return f"{scheme}{uri[len(scheme) :]}"


def joined(folder: str, name: str) -> str:
    """The URI of a name relative to a folder in a store or on a web server. ``.`` and ``..`` are
    steps, as on a disk, and never lead above the bucket or host (RFC 3986, 5.2.4); stores would
    take them for letters."""
    scheme, _, place = folder.rstrip("/").partition("://")
    host, *steps = place.split("/")
    for step in name.split("/"):
        if step == "..":
            del steps[-1:]
        elif step != ".":
            steps.append(step)
    return f"{scheme}://{'/'.join((host, *steps))}"


def is_local(uri: str) -> bool:
    """Whether it is a path or a ``file:`` URI."""
    return scheme_of(uri) in (None, "file")


def without_secrets(uri: str) -> str:
    """The URI without user info and query; a plain path as it is; a data: URI without its data.

    The names of objects and of archives' members may have ``?`` and ``#`` in them and keep these:
    only what reads like a signature, ``?name=...``, goes. ``abfs://container@account...`` keeps
    its container, which is no secret.
    """
    if uri[:5].lower() == "data:":
        return uri[: uri.find(",")] if "," in uri else uri  # never a copy of what may be a gigabyte
    if "://" not in uri or _UNCHANGED.fullmatch(uri):  # most are so, and splitting is slow
        return uri
    scheme = scheme_of(uri)
    if scheme is None:
        return uri
    is_chain = scheme not in STORES and scheme not in ("http", "https")
    if is_chain and (
        chained := _CHAINED.search(uri)
    ):  # zip://member::https://user:key@host/file.zip?signature
        return f"{uri[: chained.end()]}{without_secrets(uri[chained.end() :])}"
    if scheme in ("zip", "tar") and "::" in uri:  # in an archive on the local disk
        return uri
    if scheme in STORES:
        return _object_without_secrets(uri, scheme)
    try:
        parts = urlsplit(uri)
    except ValueError:
        return _USER_INFO.sub("", uri.partition("?")[0])
    host = parts.netloc.rpartition("@")[2]
    page = parts.fragment if PAGE.fullmatch(f"#{parts.fragment}") else ""
    return urlunsplit((parts.scheme, host, parts.path, "", page))


def _object_without_secrets(uri: str, scheme: str) -> str:
    place = uri.partition("://")[2]
    while user := _user_before(place, scheme):
        place = place[user.end() :]
    bare = f"{scheme}://{place}"
    page = PAGE.search(bare)
    shown = _QUERY.sub("", bare)
    return shown if shown == bare or page is None else f"{shown}{page.group()}"


def _user_before(place: str, scheme: str) -> re.Match[str] | None:
    """What stands before a bucket and does not belong there."""
    return re.match(_KEYS if scheme in _CONTAINED else rf"{_KEYS}|[^/@]*@", place)


def check_names_object(uri: str) -> None:
    """Raises UsageError for the URI of a store that names no object, or has a password in it, which
    no store takes from there and which its library might repeat in an error."""
    scheme, place = scheme_of(uri) or "", uri.partition("://")[2]
    bucket, _, key = place.partition("/")
    if _user_before(place, scheme):
        raise UsageError(
            f"credentials do not belong into the address of {without_secrets(uri)}",
            hint="set the store's own variables in the environment",
        )
    if EXTRAS.get(scheme) in ("s3", "gcs", "azure") and not (bucket and key.strip("/")):
        raise UsageError(f"{without_secrets(uri)} names no object")


def filesystem_of(uri: str, **options: Any) -> tuple[Any, str]:
    """(the fsspec filesystem of a URI, the path in it). Listings are never cached; ``options`` go
    to the filesystem.

    Raises UsageError for a scheme that nothing here reads, and CredentialsRefused where the
    environment does not tell which account of Azure is meant.
    """
    import fsspec

    scheme = scheme_of(uri) or "file"
    store = EXTRAS.get(scheme)
    _settle(store)
    try:
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, **options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        raise UsageError(
            f"{scheme}: needs a library that is not installed ({error})",
            hint=f"pip install 'vlmbatch[{extra}]'" if extra else "install it beside vlmbatch",
        ) from None
    except ValueError as error:
        if store == "azure":
            raise CredentialsRefused(
                f"cannot tell how to reach {without_secrets(uri)} ({said(error)})", hint=_FOR_AZURE
            ) from None
        raise UsageError(
            f"nothing here reads {scheme}: {without_secrets(uri)} ({error})",
            hint="local paths, s3:, gs:, az:, hf: and https: can be read",
        ) from None
    if store == "azure":
        _settle_azure(fs, uri)
    return fs, path


def _settle(store: str | None) -> None:
    """What the libraries of Google and Azure read when they are imported."""
    if store == "gcs":
        # Else gcsfs asks a second service of Google's what kind of bucket it is, before each
        # request for as long as it gets no answer. Only zonal buckets need it.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        if _is_elsewhere():  # else who has no credentials waits for the metadata server's silence
            os.environ.setdefault("NO_GCE_CHECK", "true")
    # They log what they raise as well, some with a traceback, and Azure's each request.
    for name in {"gcs": ("gcsfs", "google"), "azure": ("azure",)}.get(store or "", ()):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _is_elsewhere() -> bool:
    """Whether this machine says of itself that it is none of Google's."""
    if any(name.startswith("GCE_METADATA_") for name in os.environ):
        return False
    try:
        return not Path("/sys/class/dmi/id/product_name").read_text().startswith("Google")
    except OSError:
        return False


def _settle_azure(fs: Any, uri: str) -> None:
    service = fs.service_client
    # Azure's own retries take a minute and a half, even for want of credentials, before anything is
    # said. Whoever asks here asks again.
    service._config.retry_policy.total_retries = 0
    container, _, place = urlsplit(uri).netloc.rpartition("@")
    named = place.partition(".")[0] if container else ""
    meant = service.account_name
    if named and meant and named != meant:  # a connection string overrules the address
        raise UsageError(
            f"{without_secrets(uri)} is in the account {named}, but "
            f"AZURE_STORAGE_CONNECTION_STRING is of {meant}",
            hint="give the connection string of one account, or AZURE_STORAGE_ACCOUNT_KEY without "
            "it, or log in with `az login`",
        )


_FOR_AZURE = (
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME, and with it "
    "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN where `az login` does not do"
)


class Trouble(StrEnum):
    """What an error of a store means to the one who asked."""

    MISSING = "missing"
    FORBIDDEN = "forbidden"
    CREDENTIALS = "credentials"
    """They are missing, wrong or expired: nothing else will work either."""
    BUSY = "busy"
    """Throttled, or an error of the server's: later it may work."""
    EXISTS = "exists"
    """A conditional write found that something is there."""
    OTHER = "other"


_BY_CODE = {
    **dict.fromkeys(("NoSuchKey", "NoSuchBucket", "404", "NotFound"), Trouble.MISSING),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "403", "Forbidden"), Trouble.FORBIDDEN),
    **dict.fromkeys(
        (
            *("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"),
            *("InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "401"),
            *("Unauthorized", "RequestExpired"),
            *("PublicAccessNotPermitted", "KeyBasedAuthenticationNotPermitted"),  # Azure's
        ),
        Trouble.CREDENTIALS,
    ),
    **dict.fromkeys(("BlobArchived", "BlobImmutableDueToPolicy"), Trouble.FORBIDDEN),  # with 409
    **dict.fromkeys(("PreconditionFailed", "412", "BlobAlreadyExists"), Trouble.EXISTS),
    **dict.fromkeys(
        (
            *("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling"),
            *("ThrottlingException", "RequestLimitExceeded", "OperationAborted", "BadDigest"),
            *("ConditionalRequestConflict", "IncompleteBody"),
            *("408", "409", "429", "500", "502", "503", "504"),
        ),
        Trouble.BUSY,
    ),
}
_BY_NAME = {
    "RepositoryNotFoundError": Trouble.MISSING,  # the Hub says 401 for it to whoever is unknown
    "GatedRepoError": Trouble.FORBIDDEN,
    "NoCredentialsError": Trouble.CREDENTIALS,
    "PartialCredentialsError": Trouble.CREDENTIALS,
    "TokenRetrievalError": Trouble.CREDENTIALS,
    "CredentialRetrievalError": Trouble.CREDENTIALS,
    "DefaultCredentialsError": Trouble.CREDENTIALS,
    "RefreshError": Trouble.CREDENTIALS,
    "ClientAuthenticationError": Trouble.CREDENTIALS,
    "AzureSigningError": Trouble.CREDENTIALS,  # a key that is none
    "ServiceRequestError": Trouble.BUSY,
    "ServiceResponseError": Trouble.BUSY,
    "IncompleteReadError": Trouble.BUSY,
}
_BUSY_NUMBERS = {
    *(errno.EBUSY, errno.EREMOTEIO, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED),
    *(errno.EPIPE, errno.ETIMEDOUT, errno.EAGAIN, errno.EHOSTUNREACH, errno.ENETUNREACH),
}


def trouble_of(error: BaseException) -> Trouble:
    """What the error means, by the store's own code where it has one, else by its kind."""
    causes = list(_causes(error))
    for cause in causes:
        if type(cause).__name__ in _BY_NAME:
            return _BY_NAME[type(cause).__name__]
        code = _code_of(cause)
        if code in _BY_CODE:
            return _BY_CODE[code]
    for cause in causes:
        match cause:
            case FileNotFoundError() | NotADirectoryError():
                return Trouble.MISSING
            case PermissionError():
                return Trouble.FORBIDDEN
            case FileExistsError():
                return Trouble.EXISTS
            case TimeoutError() | ConnectionError():
                return Trouble.BUSY
            case OSError() if cause.errno in _BUSY_NUMBERS:
                return Trouble.BUSY
            case OSError() if cause.errno is None and str(cause).startswith("Forbidden: "):
                return Trouble.FORBIDDEN  # gcsfs's word for 403
        module = type(cause).__module__.partition(".")[0]
        if module in ("aiohttp", "urllib3", "requests", "httpx") or (
            module in ("botocore", "aiobotocore") and _code_of(cause) is None
        ):
            return Trouble.BUSY  # the connection's own trouble: an answer would have had a code
    return Trouble.OTHER


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def _code_of(error: BaseException) -> str | None:
    """S3's error code (botocore), Azure's, or the HTTP status (adlfs, gcsfs, huggingface_hub,
    aiohttp)."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("Error", {}).get("Code")
        if str(found) not in _BY_CODE:  # the status says enough of a code that nobody knows
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode", found)
        return None if found is None else str(found)
    named = getattr(error, "error_code", None)  # Azure's says more than its status
    if str(getattr(named, "value", named)) in _BY_CODE:
        return str(getattr(named, "value", named))
    for holder, name in (
        *((error, "status_code"), (response, "status_code")),
        *((error, "status"), (error, "code")),  # aiohttp's warns of its code
    ):
        found = getattr(holder, name, None)
        if isinstance(found, int) or (isinstance(found, str) and found.isdigit()):
            return str(found)
    return None


def said(error: BaseException) -> str:
    """The error in a line, without secrets and colours, and what Azure's adds to its sentence."""
    sentence = re.split(r"\n(?:RequestId|ErrorCode|Content|Attempted credentials):", str(error))[0]
    words = " ".join((sentence.strip() or type(error).__name__).split())
    words = re.sub(r"\x1b\[[0-9;]*m", "", words)
    return re.sub(r"(?<=\?)\S*|(?<=//)[^/\s@]+@", "...", words)[:300]
