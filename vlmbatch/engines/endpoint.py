"""An OpenAI-compatible endpoint: its address, its key, what it serves, and what its errors mean.

The one module that imports the ``openai`` library, when an endpoint is opened. The key comes from
the environment and goes into no message: what the endpoint says is redacted here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from vlmbatch.engines.chat import NoContent, Unreadable, completion_of, refusal, shortened
from vlmbatch.errors import EndpointError, EngineStartError, ErrorCode, Stage, UsageError, failed
from vlmbatch.job import EngineSpec
from vlmbatch.records import Completion

CONNECT_SECONDS = 10.0
LIST_SECONDS = 30.0
LONGEST_RETRY_AFTER = 300.0
DEFAULT_KEY_ENV = "OPENAI_API_KEY"

_NOT_NOW = (429, 502, 503, 504)
_PASSING = (408, 409, 425)


def address_of(base_url: str) -> str:
    """``http://host:8000`` as ``http://host:8000/v1``. Raises UsageError, which never quotes it.

    What it might hold besides the address would be stored with the run.
    """
    try:
        parts = urlsplit(base_url.strip())
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(
            "--base-url is no http(s) address", hint="as in --base-url http://127.0.0.1:8000/v1"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"the --base-url of {host} holds more than an address: it would be stored with the run",
            hint="leave out user:password@ and ?query; a key goes into the environment variable "
            f"that --api-key-env names ({DEFAULT_KEY_ENV})",
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def check_key_env(name: str) -> None:
    """Raises UsageError, without quoting it, for what may be the key itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
        raise UsageError(
            "--api-key-env is no name of an environment variable",
            hint=f"it names the variable that holds the key, such as {DEFAULT_KEY_ENV}; "
            "the key itself is never given on the command line",
        )


@dataclass(frozen=True, slots=True)
class Offer:
    """What an endpoint says that it serves; ``models`` is None where it has no list."""

    models: tuple[str, ...] | None
    dialect: str = "openai"


class Setback(Exception):
    """A request was not answered, and may be when it is sent again.

    ``wait``: how long the endpoint wants to be left alone, in seconds. ``slows``: it is asked too
    much, or gone; ``is_down``: it cannot be reached. ``blames_request``: the request itself may be
    the cause.
    """

    def __init__(
        self,
        message: str,
        *,
        wait: float | None = None,
        slows: bool = True,
        is_down: bool = False,
        blames_request: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.wait = wait
        self.slows = slows
        self.is_down = is_down
        self.blames_request = blames_request


class Endpoint:
    """A connection to an endpoint; belongs to one event loop. ``timeout``: seconds per request."""

    def __init__(self, engine: EngineSpec, *, timeout: float) -> None:
        self.address = address_of(engine.base_url or "")
        self._timeout = timeout
        self._key_env = engine.api_key_env
        self._key = _key_from(engine.api_key_env)
        try:
            import openai
        except ImportError as error:
            raise EngineStartError(
                f"the openai engine needs the library openai ({error})",
                hint="pip install 'vlmbatch[openai]'",
            ) from None
        self._openai = openai
        for name in ("httpx", "httpx2", "openai"):  # they log a line per request
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = openai.AsyncOpenAI(
            base_url=self.address,
            api_key=self._key or "EMPTY",  # what vLLM's own clients send
            max_retries=0,
            timeout=openai.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout)),
        )

    async def offer(self) -> Offer:
        """Raises EndpointError if it does not let us in, Setback if it cannot be asked now."""
        models = self._client.models.with_raw_response
        try:
            async with asyncio.timeout(LIST_SECONDS):
                text = (await models.list()).text
        except TimeoutError:
            raise Setback(f"no list of its models within {LIST_SECONDS:.0f} s") from None
        except self._openai.APIStatusError as error:
            if error.status_code in (404, 405, 501):
                return Offer(None)
            raise self._meaning(error, "/models") from None
        except self._openai.APIConnectionError as error:
            raise _disconnected(error) from None
        return _offer_in(text)

    async def chat(self, body: dict[str, Any], *, private: Sequence[str] = ()) -> Completion:
        """Raises RequestFailed, EndpointError or Setback; ``private`` stands in no message."""
        rest = {key: value for key, value in body.items() if key not in ("model", "messages")}
        completions = self._client.chat.completions.with_raw_response
        try:
            async with asyncio.timeout(self._timeout):  # the library's is between two bytes
                response = await completions.create(
                    model=body["model"], messages=body["messages"], extra_body=rest
                )
            return completion_of(response.text)
        except TimeoutError:
            raise self._timed_out() from None
        except Unreadable as error:
            raise Setback(
                f"no chat completion: {self._shown(str(error), private)}",
                slows=False,
                blames_request=True,
            ) from None
        except NoContent as error:
            raise failed(
                ErrorCode.ENGINE_FAILED, Stage.GENERATE, self._shown(str(error), private)
            ) from None
        except self._openai.APIStatusError as error:
            raise self._meaning(error, "/chat/completions", private) from None
        except self._openai.APITimeoutError as error:
            if "Connect" in type(error.__cause__).__name__:
                raise Setback("no connection within 10 s", is_down=True) from None
            raise self._timed_out() from None
        except self._openai.APIConnectionError as error:
            raise _disconnected(error) from None

    async def close(self) -> None:
        await self._client.close()

    def _shown(self, text: str, private: Sequence[str]) -> str:
        """In one line, without the key and what else is private."""
        for secret in private:
            text = text.replace(secret, "[address]")
        return shortened(text.replace(self._key, "[key]") if self._key else text)

    def _timed_out(self) -> Exception:
        return failed(
            ErrorCode.ENGINE_TIMEOUT,
            Stage.GENERATE,
            f"no answer within {self._timeout:g} s",
            retryable=True,
        )

    def _meaning(self, error: Any, path: str, private: Sequence[str] = ()) -> Exception:
        """What a status says about the request, the endpoint or the run."""
        status: int = error.status_code
        said = self._shown(_said(error), private)
        code = str(error.code) if error.code is not None else None
        if status in (401, 403):
            return self._not_let_in(status, said)
        if status == 402 or code == "insufficient_quota":
            return EndpointError(f"{self.address} wants to be paid ({status}): {said}")
        if status == 405 or (status == 404 and _is_about_address_or_model(error, said)):
            return EndpointError(
                f"{self.address}{path} is not there ({status}): {said}",
                hint="check --base-url (it mostly ends in /v1) and the model's name, -m",
            )
        if status in _NOT_NOW:
            return Setback(f"{status}: {said}", wait=_retry_after(error.response.headers))
        if status >= 500 or status in _PASSING:
            return Setback(f"{status}: {said}", slows=False, blames_request=True)
        return refusal(status, code, said)

    def _not_let_in(self, status: int, said: str) -> EndpointError:
        if self._key is None:
            has = f"the environment variable {self._key_env} is not set"
            hint = f"export {self._key_env}=... where the workers run, or name another one with "
        else:
            has = f"the key is that of the environment variable {self._key_env}"
            hint = "set it to a key that is valid there, or name another one with "
        return EndpointError(
            f"{self.address} does not let us in ({status}; {has}): {said}",
            hint=f"{hint}--api-key-env",
        )


def look(engine: EngineSpec) -> Offer:
    """What the endpoint serves, asked once. Raises EndpointError where it cannot be reached."""

    async def ask() -> Offer:
        endpoint = Endpoint(engine, timeout=LIST_SECONDS)
        try:
            return await endpoint.offer()
        except Setback as setback:
            raise EndpointError(
                f"{endpoint.address} cannot be asked for its models: {setback.message}",
                hint="is the server up, and is that its address? It may take minutes to load a "
                "model",
            ) from None
        finally:
            await endpoint.close()

    return asyncio.run(ask())


def chosen_model(offer: Offer, address: str) -> str:
    """The only model that the endpoint serves. Raises UsageError if there is a choice."""
    if not offer.models:
        raise UsageError(f"{address} does not say which models it has", hint="name one with -m")
    if len(offer.models) > 1:
        raise UsageError(
            f"{address} has several models: {_some(offer.models)}", hint="name one with -m"
        )
    return offer.models[0]


def check_served(model: str, offer: Offer, address: str) -> None:
    """Raises UsageError for a name that a vLLM server does not have.

    Lists of others are not complete (aliases, deployments): they say so when they are asked.
    """
    if offer.dialect == "vllm" and offer.models is not None and model not in offer.models:
        raise UsageError(
            f"{address} has no model {model!r}; it has: {_some(offer.models)}",
            hint="name one of these with -m",
        )


def _some(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _key_from(name: str) -> str | None:
    key = os.environ.get(name, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise EngineStartError(f"the environment variable {name} holds no key: odd characters")
    if not key and name != DEFAULT_KEY_ENV:
        raise EngineStartError(
            "the environment variable that --api-key-env names is not set here",
            hint="export it where vlmbatch and its workers run",
        )
    return key or None


def _offer_in(text: str) -> Offer:
    try:
        models = json.loads(text)["data"]
        names = tuple(dict.fromkeys(str(model["id"]) for model in models))
        is_vllm = any(model.get("owned_by") == "vllm" for model in models)
        return Offer(names, "vllm" if is_vllm else "openai")
    except (ValueError, LookupError, TypeError, AttributeError):
        return Offer(None)


def _said(error: Any) -> str:
    """The message in the body of an error, whatever form it has."""
    body = error.body
    if isinstance(body, dict):
        for key in ("message", "detail", "error"):
            if isinstance(body.get(key), str):
                return str(body[key])
        return json.dumps(body)
    with suppress(Exception):
        return str(error.response.text) or "without a word"
    return "without a word"


def _is_about_address_or_model(error: Any, said: str) -> bool:
    """Whether a 404 is one for every request: no such path, or no such model."""
    is_of_api = isinstance(error.body, dict) and isinstance(error.body.get("message"), str)
    return not is_of_api or error.code == "model_not_found" or "model" in said.lower()


def _disconnected(error: Exception) -> Setback:
    """``is_down``: no connection came about; else it broke while the request was out."""
    cause = error.__cause__
    why = str(cause).strip() or type(cause).__name__
    is_down = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "ProxyError")
    message = f"{'no connection' if is_down else 'the connection broke'} ({shortened(why, 120)})"
    return Setback(message, is_down=is_down, blames_request=not is_down)


def _retry_after(headers: Any) -> float | None:
    """Seconds, from seconds or an HTTP date, at most LONGEST_RETRY_AFTER."""
    value = str(headers.get("retry-after", "")).strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER) if seconds == seconds else None
