"""A model behind HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import ssl
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2
from torch import Tensor

from gradless.attacks.answers import read_answer
from gradless.errors import GradlessError

Answer = tuple[int, httpx2.Headers, bytes]
"""A call's status, headers and body."""
TRIES = 5
"""Most times that a call is made."""
BUSY = (429, 502, 503, 504)
"""Statuses of a server that is busy."""
BACKOFF = 0.5
"""Seconds before the second try of a call; they double before each further one."""
LONGEST = 300.0
"""Longest wait, in seconds, that a busy server may ask for."""
MEGABYTE = 2**20
"""Bytes that an answer may have, plus as many for each image."""
MOST = 64 * MEGABYTE
"""Most bytes of any answer."""


def shown(address: str) -> str:
    """An address for files and messages: without user and password, and with a short hash in place of what follows a "?"."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "(an address that cannot be read)"
    query = f"?{hashlib.sha256(parts.query.encode()).hexdigest()[:4]}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


class Endpoint:
    """POST {"images": [..]} -> {"scores": [[..]]} or {"labels": [..]}.

    It waits to stay below the rate, and as long as a busy server (`BUSY`) asks. A call whose connection breaks is made again;
    a call that takes too long, or is redirected, is not.

    Args:
        address: the model's address. A user and a password in it go into the request's header only.
        rate: most images a second; None for no limit.
        timeout: most seconds for a call, from the connection to the last byte.

    Raises:
        GradlessError: the address cannot be read.
    """

    def __init__(self, address: str, rate: float | None = None, timeout: float = 30.0) -> None:
        self.name, self.rate, self.timeout = shown(address), rate, timeout
        try:
            self._address = httpx2.URL(address)
        except (httpx2.InvalidURL, ValueError) as error:
            raise GradlessError(f"--model {self.name}: that is no address.") from error
        if not self._address.host:
            raise GradlessError(f"--model {self.name}: that is no address.")
        self._next, self._answered = 0.0, False
        self._certificates = httpx2.create_ssl_context()

    def __call__(self, batch: Tensor) -> Tensor:
        """Scores (n, classes) or classes (n,).

        Raises:
            GradlessError: there is no answer, or it cannot be read.
        """
        time.sleep(max(0.0, self._next - time.monotonic()))
        if self.rate is not None:
            self._next = time.monotonic() + len(batch) / self.rate
        body = json.dumps({"images": batch.tolist()}).encode()
        for attempt in range(TRIES):
            wait, last = BACKOFF * 2**attempt, attempt + 1 == TRIES
            try:
                status, headers, text = _done(self._post(body, min(MEGABYTE * (1 + len(batch)), MOST)))
            except TimeoutError as error:
                raise GradlessError(f"{self.name} took more than {self.timeout:g} seconds; give a larger --timeout.") from error
            except (httpx2.HTTPError, OSError) as error:
                if last or not self._may_come_back(error):
                    raise GradlessError(f"{self.name} cannot be reached: {_cause(error)}.") from error
            else:
                self._answered = True
                if status == 200:
                    return self._read(text, len(batch))
                if status in BUSY and not last:
                    wait = self._asked_wait(headers.get("Retry-After"), wait)
                elif 300 <= status < 400:
                    target = shown(urljoin(str(self._address), headers.get("Location", "")))
                    raise GradlessError(
                        f"{self.name} sends its callers to {target} ({status}); give that address if you trust it."
                    )
                else:
                    raise GradlessError(f"{self.name} answered {status} {httpx2.codes.get_reason_phrase(status)}.")
            time.sleep(wait)
        raise AssertionError

    async def _post(self, body: bytes, most: int) -> Answer:
        """One call; the body is read only if the status is 200.

        Raises:
            GradlessError: the body is longer than `most` bytes.
            TimeoutError, httpx2.HTTPError, OSError: the call fails.
        """
        sent, text = {"Content-Type": "application/json"}, bytearray()
        async with (
            asyncio.timeout(self.timeout),
            httpx2.AsyncClient(timeout=None, verify=self._certificates, follow_redirects=False) as client,
            client.stream("POST", self._address, content=body, headers=sent) as response,
        ):
            if response.status_code == 200:
                async for part in response.aiter_bytes():
                    text += part
                    if len(text) > most:
                        raise GradlessError(
                            f"{self.name} answered with more than {most} bytes, too many for an answer to its images."
                        )
            return response.status_code, response.headers, bytes(text)

    def _may_come_back(self, error: Exception) -> bool:
        """Whether to make a failed call again: a broken connection is worth it, a server that has never answered is not."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return False
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx2.ConnectError):
            return self._answered
        return isinstance(error, httpx2.NetworkError | httpx2.RemoteProtocolError | OSError)

    def _asked_wait(self, asked: str | None, otherwise: float) -> float:
        """Seconds until a busy server wants the next call, which it gives in seconds or as a date."""
        seconds = math.nan
        with contextlib.suppress(TypeError, ValueError):
            seconds = float(asked or "")
        if math.isnan(seconds):
            try:
                date = parsedate_to_datetime(asked or "")
            except ValueError:
                return otherwise
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        if seconds > LONGEST:
            raise GradlessError(
                f"{self.name} is busy and wants to be left alone for {seconds:.0f} seconds; run the same command with "
                "--resume then."
            )
        return max(0.0, seconds)

    def _read(self, text: bytes, images: int) -> Tensor:
        try:
            answer: Any = json.loads(text)
            named = {name: answer[name] for name in ("scores", "labels") if name in answer}
            if not named:
                raise KeyError("scores")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise GradlessError(f'{self.name} answered with no JSON of "scores" or "labels": {text[:80]!r}.') from error
        return read_answer(named, images)


def _done(call: Coroutine[object, object, Answer]) -> Answer:
    """The result of a coroutine, even while an event loop is running, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(call)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, call).result()


def _cause(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
