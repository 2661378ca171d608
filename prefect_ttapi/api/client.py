"""TTAPIClient: images from the API, each request sent no more often than is safe."""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from typing import Final, NoReturn, Self

import httpx
from pydantic import SecretStr

from prefect_ttapi.api.answers import Body, read_answer_of, read_answers
from prefect_ttapi.api.downloads import MAX_IMAGE_BYTES, PATIENCE, Downloader, reach_from
from prefect_ttapi.api.json_stream import MAX_BYTES
from prefect_ttapi.api.limiter import Clock, Pace
from prefect_ttapi.api.outcomes import Failure
from prefect_ttapi.api.payload import Answer, Item
from prefect_ttapi.api.redaction import Redactor, checked_key
from prefect_ttapi.api.retries import Attempts, Guard, RetryPolicy
from prefect_ttapi.api.transport import UNREADABLE, Opened, Transport, judge_unreadable, may_be_paid
from prefect_ttapi.errors import DownloadError
from prefect_ttapi.images.headers import PROMISED
from prefect_ttapi.origins import DEFAULT_BASE_URL, checked_base_url, origin_of
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import (
    CompletedImage,
    GeneratedImage,
    GeneratedImages,
    PartialImage,
    RawAnswer,
    Usage,
)
from prefect_ttapi.stopping import Stop

log: Final = logging.getLogger(__name__)

LONGEST_TIMEOUT: Final = 86_400.0  # seconds


class TTAPIClient:
    """Asks the API for images; thread-safe, usable without Prefect.

    Args:
        api_key: sent to `base_url` only; shown nowhere.
        base_url: https, or http on this machine.
        connect_timeout: seconds to connect, and to write each piece of the request.
        read_timeout: seconds of silence between two bytes of the answer, the first one included. It does not
            bound the whole answer. A model may think for minutes before the first byte, and whoever gives up may
            pay for nothing.
        retry_unknown_outcome: send again also what may have been worked on, and paid, already.
        max_attempts: sends in all; 500, 502 and 503 are sent three times at most.
        retry_after_ceiling: seconds; where the API asks to wait longer, the error is raised at once.
        total_timeout: seconds from the first send after which none is begun. One under way is never cut off,
            as it may be paid already. None: no limit.
        max_body_bytes: the longest answer; images go to temporary files, not into memory.
        max_image_bytes: the largest image behind a URL.
        clock: time and chance, for tests.

    Raises:
        ValueError: an argument makes no sense; the key is in no message.

    Pace: where the API says that it is too much (429, 499), all requests of the client are sent more slowly for a
    while, those that wait longest first; a wait that it asks of one (Retry-After) is kept by all. Of a burst of
    requests that are rejected together, one counts an attempt; the others did not have a chance.

    Connections: each request has one of its own, since one that was idle may be closed under a request, which then
    has an unknown outcome. Proxies for the API are taken from the environment, as httpx does; image URLs are fetched
    without any.
    """

    def __init__(
        self,
        api_key: str | SecretStr,
        base_url: str = DEFAULT_BASE_URL,
        *,
        connect_timeout: float = 10.0,
        read_timeout: float = 600.0,
        retry_unknown_outcome: bool = False,
        max_attempts: int = 4,
        retry_after_ceiling: float = 120.0,
        total_timeout: float | None = None,
        max_body_bytes: int = MAX_BYTES,
        max_image_bytes: int = MAX_IMAGE_BYTES,
        clock: Clock | None = None,
    ) -> None:
        if not (0 < connect_timeout <= LONGEST_TIMEOUT and 0 < read_timeout <= LONGEST_TIMEOUT):
            raise ValueError(
                "connect_timeout and read_timeout must be more than 0 seconds, and at most a day"
            )
        self.base_url = checked_base_url(base_url)
        self.api_origin = origin_of(base_url)
        self._policy = RetryPolicy(max_attempts, retry_unknown_outcome, retry_after_ceiling, total_timeout)
        self._max_body_bytes = max_body_bytes
        self._clock = clock or Clock()
        self._pace = Pace(self._clock)
        key = checked_key(api_key)
        self._redactor = Redactor(key)
        ssl_context = httpx.create_ssl_context()
        self._transport = Transport(
            self.base_url,
            key,
            timeout=httpx.Timeout(
                connect=connect_timeout, write=connect_timeout, read=read_timeout, pool=None
            ),
            ssl_context=ssl_context,
            clock=self._clock,
        )
        self._downloader = Downloader(
            reach=reach_from(self.base_url),
            connect_timeout=connect_timeout,
            max_bytes=max_image_bytes,
            ssl_context=ssl_context,
            clock=self._clock,
        )

    def __repr__(self) -> str:
        return f"TTAPIClient(base_url={self.base_url!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a TTAPIClient holds connections and the key: make one where it is needed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Images stay readable."""
        self._transport.close()
        self._downloader.close()

    def generate(
        self, request: ImageRequest, guard: Guard | None = None, *, patience: float | None = None
    ) -> GeneratedImages:
        """Return the images that `request` asks for.

        They are read from an answer of any form, also from one that was cut: whole images count. Perhaps fewer than
        `n`, with a warning in the log: where some of those that came are of no use, or can't be fetched, the others are
        paid all the same.

        Args:
            request: what to ask for; never sent with `stream`.
            guard: asked right before each send; ends the request while it waits to be sent.
            patience: seconds for which images that came as URLs are fetched, as they are paid; each is tried at least
                once. None: 300. A stop of the guard ends it: the error has the answer.

        Raises:
            StopSending: the guard ended the request before anything was sent.
            TTAPIError: there are no images; its class, and `outcome`, say why and whether they may be paid, and its
                `answer` is what came, for `read_again`.
        """
        guard = guard or Guard()
        with Attempts(request.request_hash[:12], self._policy, self._pace, guard) as attempts:
            attempts.begin()
            while isinstance(found := self._ask(request, guard), Failure):
                attempts.failed(found)
            attempts.answered()
        answer, opened = found
        raw = opened.answer() if any(item.image is None for item in answer.items) else None
        if raw is not None:
            guard.before_fetching(raw)
        try:
            images = self._all(request, answer, raw, patience=patience, stop=guard.stop)
        except DownloadError as lost:
            raise _paid(lost, attempts, opened, raw) from None
        return replace(
            images,
            attempts=attempts.count,
            seconds=attempts.elapsed,
            request_id=opened.request_id,
            earlier_outcomes=attempts.earlier,
        )

    def read_again(
        self,
        request: ImageRequest,
        answer: RawAnswer,
        *,
        had: Collection[int] = (),
        patience: float | None = None,
        stop: Stop | None = None,
    ) -> GeneratedImages:
        """Return the images of an answer that an earlier call could not read, or fetch; nothing is sent to the API.

        Args:
            request: what the answer is to.
            had: the indices of images that were had before, and are left out: their addresses may be of no use by now.
            answer: the `answer` of the earlier error.
            patience: as in `generate`.
            stop: ends the wait for another try to fetch: the answer is kept.

        Raises:
            TTAPIError: as `generate`, with `answer` again.
        """
        try:
            read = read_answer_of(Body(answer.chunks(), answer.media_type), request.n, self._max_body_bytes)
        except UNREADABLE as error:
            verdict, message = judge_unreadable(error, request.prompt)
            raise verdict.error(
                self._redactor.clean(message),
                request_id=answer.request_id,
                answer=answer if may_be_paid(verdict) else None,
            ) from None
        images = self._all(request, read, answer, patience=patience, stop=stop, had=had)
        return replace(images, request_id=answer.request_id)

    def stream(
        self, request: ImageRequest, guard: Guard | None = None, *, patience: float | None = None
    ) -> Generator[PartialImage | CompletedImage, None, None]:
        """Yield previews and finished images of `request` as they come; nothing is sent before the first is asked for.

        Sends `stream: true` whatever the request says. Never sent again once the answer began. Closing the
        generator closes the connection; the vendor may go on, and bill. Until its end the stream is in flight, and
        other requests may have to wait for it. With `n` > 1 the events do not tell
        which image a preview belongs to, nor which finished image is which: they are numbered as they come.

        Args:
            request: what to ask for, always sent with `stream`.
            guard: as in `generate`.
            patience: as in `generate`.

        Raises:
            StopSending: as in `generate`.
            TTAPIError: no image was finished, one can't be fetched, or the stream reports an error; `answer` is what
                came.
        """
        guard = guard or Guard()
        came, problems, elsewhere = 0, list[str](), list[tuple[int, Item, list[Usage | None]]]()
        failure: Failure | None = None
        with Attempts(request.request_hash[:12], self._policy, self._pace, guard) as attempts:
            body = request.body(stream=True)
            attempts.begin()
            while isinstance(opened := self._transport.open(body, guard), Failure):
                attempts.failed(opened)
            attempts.answered()
            with closing(opened):
                try:
                    for part in read_answers(opened.body(), request.n, self._max_body_bytes):
                        if isinstance(part, PartialImage):
                            yield part
                            continue
                        usage = [part.usage]  # told with the first of its images that is had
                        for item in part.items:
                            if item.image is None:  # fetched later: the connection would not wait
                                elsewhere.append((came, item, usage))
                            else:
                                yield _completed(self._image(request, came, item), usage, attempts, opened)
                            came += 1
                        problems += part.problems
                except UNREADABLE as error:
                    failure = opened.failure(error)
            if failure is not None:  # raised here, not above, so as not to show what httpx says
                raise attempts.error(failure)
        raw = opened.answer() if elsewhere else None
        if raw is not None:
            guard.before_fetching(raw)
        over, lost = self._over(patience), None
        for index, item, usage in elsewhere:
            try:
                image = self._image(request, index, item, over, guard.stop)
            except DownloadError as error:
                lost = lost or error  # the others are paid, too
            else:
                yield _completed(image, usage, attempts, opened)
        if lost is not None:
            raise _paid(lost, attempts, opened, raw)
        _warn(request, came, problems)

    def _ask(self, request: ImageRequest, guard: Guard) -> tuple[Answer, Opened] | Failure:
        """Return the answer and what it was read from, or why there is none."""
        opened = self._transport.open(request.body(), guard)
        if isinstance(opened, Failure):
            return opened
        with closing(opened):
            try:
                return read_answer_of(opened.body(), request.n, self._max_body_bytes), opened
            except UNREADABLE as error:
                return opened.failure(error)

    def _all(
        self,
        request: ImageRequest,
        read: Answer,
        raw: RawAnswer | None,
        *,
        patience: float | None,
        stop: Stop | None,
        had: Collection[int] = (),
    ) -> GeneratedImages:
        """Return the images that can be had, with `raw` where others can't; DownloadError: none can."""
        images, over, lost = list[GeneratedImage](), self._over(patience), None
        for index, item in enumerate(read.items):
            if index not in had:
                try:
                    images.append(self._image(request, index, item, over, stop))
                except DownloadError as error:
                    lost = lost or error  # the others are paid, too
        if lost is not None and not images:
            lost.answer, lost.request_id = raw, raw.request_id if raw else None
            raise lost
        _warn(request, len(had) + len(images), (*read.problems, *([lost.message] if lost else [])))
        return GeneratedImages(tuple(images), read.usage, read.created, rest=raw if lost else None)

    def _over(self, patience: float | None) -> float:
        """Return when no fetching is begun but the first of each image."""
        return self._clock.monotonic() + (PATIENCE if patience is None else patience)

    def _image(
        self, request: ImageRequest, index: int, item: Item, over: float = 0.0, stop: Stop | None = None
    ) -> GeneratedImage:
        """Return an image of an answer, fetched where it came as a URL; DownloadError: it can't be.

        Args:
            index: its place in the answer.
            over: when no other try is begun, on the clock's monotonic scale.
        """
        name = request.request_hash[:12]
        spool, facts = item.image or self._downloader.fetch(
            item.url, f"{name} image {index}", patience=over - self._clock.monotonic(), stop=stop
        )
        if facts.media_type not in PROMISED:
            log.warning("%s: image %d is %s, which the API does not promise", name, index, facts.media_type)
        return GeneratedImage(spool=spool, index=index, revised_prompt=item.revised_prompt, **vars(facts))


def _completed(
    image: GeneratedImage, usage: list[Usage | None], attempts: Attempts, opened: Opened
) -> CompletedImage:
    return CompletedImage(
        **vars(image),
        usage=usage.pop() if usage else None,
        attempts=attempts.count,
        request_id=opened.request_id,
        earlier_outcomes=attempts.earlier,
    )


def _paid(error: DownloadError, attempts: Attempts, opened: Opened, raw: RawAnswer | None) -> DownloadError:
    """Return the error with what is known of the request that was paid."""
    error.attempts, error.elapsed = attempts.count, attempts.elapsed
    error.request_id, error.answer = opened.request_id, raw
    return error


def _warn(request: ImageRequest, came: int, problems: Iterable[str]) -> None:
    fewer = [f"{request.n} images were asked for, {came} came"] if came < request.n else []
    if wrong := [*fewer, *problems]:
        log.warning("%s: %s", request.request_hash[:12], "; ".join(wrong))
