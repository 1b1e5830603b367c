"""Any OpenAI-compatible endpoint as an engine: ``vllm serve``, SGLang, a hosted service.

What passes (429, 5xx, lost connections, a server that is started again) is waited for here, within
``outage`` seconds without any answer; a request fails only for what it is itself.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from vlmbatch.engines.arguments import parsed
from vlmbatch.engines.chat import (
    DIALECTS,
    LENGTH_FIELDS,
    body_of,
)
from vlmbatch.engines.data_uris import FORMATS, DataUris
from vlmbatch.engines.endpoint import (
    Endpoint,
    Offer,
    Setback,
    address_of,
    check_key_env,
    check_served,
)
from vlmbatch.engines.pace import Pace, Turn, backoff
from vlmbatch.errors import EndpointError, ErrorCode, RequestFailed, Stage, UsageError, failed
from vlmbatch.job import EngineSpec, parse_seconds
from vlmbatch.records import Completion, Request

log = logging.getLogger(__name__)

CONCURRENCY = 64
MOST = 1000
"""Connections that the library opens at once."""

STRIKES = 6
"""So often a request may bring on a 500 or a lost connection before it fails."""


@dataclass(frozen=True, slots=True)
class OpenAIArgs:
    """What ``--engine-arg`` may set."""

    outage: float = 300.0
    """Seconds that an endpoint which answers nothing is waited for."""
    timeout: float = 600.0
    """Seconds per request."""
    image_format: str = "auto"
    """auto, png or jpeg."""
    max_tokens_field: str = "max_tokens"
    """max_tokens or max_completion_tokens."""
    dialect: str = "auto"
    """auto, vllm or openai."""
    omit: tuple[str, ...] = ()
    """Fields never sent, as some models refuse them: ``temperature,top_p``."""


OPERATIONAL = ("outage", "timeout", "max_tokens_field")
"""Arguments that change no answer; they are not part of what was asked."""

_CHOICES = {"image_format": FORMATS, "max_tokens_field": LENGTH_FIELDS, "dialect": DIALECTS}


def check(engine: EngineSpec) -> None:
    """Raises UsageError for settings that no endpoint can be asked with."""
    if engine.base_url is None:
        raise UsageError(
            "the openai engine needs the address of its endpoint",
            hint="as in --base-url http://127.0.0.1:8000/v1",
        )
    address_of(engine.base_url)
    check_key_env(engine.api_key_env)
    if (engine.concurrency or 1) > MOST:
        raise UsageError(
            f"--concurrency {engine.concurrency}: one worker holds at most {MOST} connections",
            hint="give more --workers",
        )
    parse_args(engine.args)


def parse_args(args: dict[str, str]) -> OpenAIArgs:
    """The arguments, checked. Raises UsageError for an unknown key or an unreadable value."""
    return parsed("openai", OpenAIArgs, args, _parse, quote=False)  # a key may be among them


def _parse(key: str, value: str) -> Any:
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ValueError(f"expected one of {', '.join(_CHOICES[key])}")
        return value
    if key == "omit":
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        if {"model", "messages"} & set(names):
            raise ValueError("a request needs its model and its messages")
        return names
    seconds = parse_seconds(value)
    assert isinstance(seconds, float)
    if seconds <= 0:
        raise ValueError("expected more than 0 s")
    return seconds


class OpenAIEngine:
    """See the module. ``model``: the endpoint's name for it."""

    def __init__(self, engine: EngineSpec, *, model: str) -> None:
        check(engine)
        self._spec = engine
        self._args = parse_args(engine.args)
        self._model = model
        self._dialect = self._args.dialect
        self.capacity = engine.concurrency or CONCURRENCY
        self._uris = DataUris(self._args.image_format)
        self._endpoint: Endpoint | None = None
        self._setbacks = 0

    @property
    def counters(self) -> dict[str, int]:
        """``endpoint_setbacks``: requests that were sent and had to be sent again."""
        return {"endpoint_setbacks": self._setbacks}

    async def start(self) -> None:
        """Waits for an endpoint that is on its way up as long as for one that went away."""
        self._pace = Pace(self.capacity)
        self._endpoint = Endpoint(self._spec, timeout=self._args.timeout)
        offer = await self._offer(self._endpoint)
        if self._dialect == "auto":
            self._dialect = offer.dialect
        check_served(self._model, offer, self._endpoint.address)
        log.info("%s speaks %s", self._endpoint.address, self._dialect)

    async def generate(self, request: Request) -> Completion:
        """Raises EndpointError when nothing was answered for too long, or nobody is let in."""
        strikes = 0
        while True:
            async with self._pace.turn() as turn:
                try:
                    completion = await self._sent(request)
                except RequestFailed as error:
                    if error.failure.code is ErrorCode.ENGINE_TIMEOUT:
                        self._pace.slow_down(turn)
                    else:
                        self._pace.answered()
                    raise
                except Setback as error:
                    setback = error
                    self._fall_back(turn, setback)
                else:
                    self._pace.answered()
                    return completion
            if setback.blames_request:
                strikes += 1
                await self._judge(setback, strikes)

    async def close(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.close()
            self._endpoint = None

    async def _offer(self, endpoint: Endpoint) -> Offer:
        while True:
            async with self._pace.turn() as turn:
                try:
                    offer = await endpoint.offer()
                except Setback as setback:
                    self._fall_back(turn, setback)
                else:
                    self._pace.answered()
                    return offer

    async def _sent(self, request: Request) -> Completion:
        assert self._endpoint is not None
        by_url = self._spec.image_transport == "url"
        urls = [image.url or await self._uris.of(image) for image in request.images]
        body = body_of(
            request,
            urls,
            model=self._model,
            dialect=self._dialect,
            length_field=self._args.max_tokens_field,
            omit=self._args.omit,
        )
        # Addresses of images may be signed: they stand in no message.
        return await self._endpoint.chat(body, private=urls if by_url else ())

    def _fall_back(self, turn: Turn, setback: Setback) -> None:
        """Ask less of the endpoint. Raises EndpointError when it has been silent for too long."""
        assert self._endpoint is not None
        self._setbacks += 1
        if not self._pace.silent:
            log.warning("%s: %s", self._endpoint.address, setback.message)
        if setback.slows or self._pace.silent:
            self._pace.slow_down(turn, wait=setback.wait, to_one=setback.is_down)
        else:
            self._pace.failed()
        silent = self._pace.silent
        if self._pace.out == 1 and silent > self._args.outage:
            raise EndpointError(
                f"{self._endpoint.address} has answered nothing for {silent:.0f} s, at last: "
                f"{setback.message}",
                hint="when it answers again, the same command goes on from here; "
                "--engine-arg outage=SECONDS waits longer",
            )

    async def _judge(self, setback: Setback, strikes: int) -> None:
        """Wait before the request is sent again; it fails if it seems to be the cause itself."""
        if strikes >= STRIKES and await self._is_there():
            raise failed(
                ErrorCode.ENGINE_FAILED,
                Stage.GENERATE,
                f"the endpoint failed {strikes} times on this request, at last: {setback.message}",
            )
        await asyncio.sleep(backoff(strikes))

    async def _is_there(self) -> bool:
        assert self._endpoint is not None
        try:
            await self._endpoint.offer()
        except Setback:
            return False
        return True
