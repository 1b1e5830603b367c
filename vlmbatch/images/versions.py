"""Whether images were replaced since a run read them: what their places say of them, unread."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from vlmbatch.errors import RequestFailed
from vlmbatch.images.fetch import Fetcher, Reach

THREADS = 8


class Versions:
    """``of`` for the images of a manifest in the folder ``base``, by the rules of fetching."""

    def __init__(self, *, base: str, reach: Reach) -> None:
        self._asking = 2 * reach.at_once
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="versions")
        self._fetcher = Fetcher(base=base, reach=reach, executor=self._threads)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Versions:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._fetcher.close())
        self._runner.close()
        self._threads.shutdown(cancel_futures=True)

    def of(self, rows: Sequence[Sequence[str] | None]) -> list[str | None]:
        """Of each row's images, one text that is another one when one of them was replaced.

        None where that cannot be said: an image is missing, forbidden or inside the manifest
        (None in place of the row), or its place did not answer. Raises CredentialsRefused.
        """
        uris = dict.fromkeys(uri for row in rows if row for uri in row)
        found = self._runner.run(self._all(uris))
        return [_joined([found[uri] for uri in row]) if row else None for row in rows]

    async def _all(self, uris: Iterable[str]) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        left = iter(uris)

        async def ask() -> None:
            for uri in left:
                try:
                    found[uri] = await self._fetcher.version(uri)
                except RequestFailed:
                    found[uri] = None

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._asking):
                    group.create_task(ask())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return found


def _joined(versions: Sequence[str | None]) -> str | None:
    known = [version for version in versions if version is not None]
    return "\n".join(known) if len(known) == len(versions) else None
