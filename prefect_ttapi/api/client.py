"""TTAPIClient: images from the API, each request sent no more often than is safe."""

from __future__ import annotations

import logging
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Final, NoReturn, Self

import httpx
from pydantic import SecretStr

from prefect_ttapi.api.downloads import MAX_IMAGE_BYTES, PATIENCE, Downloader, reach_from
from prefect_ttapi.api.json_stream import MAX_BYTES
from prefect_ttapi.api.limiter import Clock, Pace
from prefect_ttapi.api.outcomes import Failure
from prefect_ttapi.api.payload import Answer, Item
from prefect_ttapi.api.redaction import Redactor, checked_key
from prefect_ttapi.api.retries import Attempts, Guard, RetryPolicy
from prefect_ttapi.api.sse import Body, read_answer_of, read_answers
from prefect_ttapi.api.transport import UNREADABLE, Opened, Transport, judge_unreadable, may_be_paid
from prefect_ttapi.errors import DownloadError, Outcome
from prefect_ttapi.images.headers import PROMISED
from prefect_ttapi.origins import DEFAULT_BASE_URL, checked_base_url, origin_of
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import CompletedImage, GeneratedImage, GeneratedImages, PartialImage, RawAnswer
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

    Connections: as many as there are requests in flight. Idle ones are kept for 2 s, less than servers keep
    them, and repeated sends get new ones: a request that meets the end of its connection has an unknown
    outcome. Proxies for the API are taken from the environment, as httpx does; image URLs are fetched
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

        They are read however the answer is dressed, also from one that was cut: whole images count. Perhaps fewer than
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
        name, guard = request.request_hash[:12], guard or Guard()
        with self._pace.turn(guard.stop) as turn:
            attempts = Attempts(name, self._policy, self._clock, turn, guard)
            answer, opened = attempts.run(partial(self._ask, request, guard))
        guard.in_hand = opened.answer
        if any(item.image is None for item in answer.items):
            guard.before_fetching()
        images, lost = _all(self._had(name, answer.items, 0, patience, guard.stop))
        if lost is not None:
            lost = self._paid(lost, attempts, opened)
            if not images:
                raise lost
        self._warn(name, request.n, len(images), answer.problems, lost)
        return GeneratedImages(
            images=images,
            usage=answer.usage,
            created=answer.created,
            attempts=attempts.count,
            seconds=attempts.elapsed,
            request_id=opened.request_id,
            earlier_outcomes=attempts.earlier,
            rest=lost.answer if lost else None,
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
        name = request.request_hash[:12]
        try:
            read = read_answer_of(Body(answer.chunks(), answer.media_type), request.n, self._max_body_bytes)
            images, lost = _all(self._had(name, read.items, patience=patience, stop=stop, had=had))
        except UNREADABLE as error:
            verdict, message = judge_unreadable(error, request.prompt)
            raise verdict.error(
                self._redactor.clean(message),
                request_id=answer.request_id,
                answer=answer if may_be_paid(verdict) else None,
            ) from None
        if lost is not None and not images:
            lost.request_id, lost.answer = answer.request_id, answer
            raise lost
        self._warn(name, request.n, len(had) + len(images), read.problems, lost)
        return GeneratedImages(
            images=images,
            usage=read.usage,
            created=read.created,
            request_id=answer.request_id,
            rest=answer if lost else None,
        )

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
        name, guard = request.request_hash[:12], guard or Guard()
        with self._pace.turn(guard.stop) as turn:
            attempts = Attempts(name, self._policy, self._clock, turn, guard)
            opened = attempts.run(partial(self._transport.open, request.body(stream=True), guard))
            finished, place, elsewhere, problems, failure = (
                0,
                0,
                list[tuple[int, Answer]](),
                list[str](),
                None,
            )
            sent = (attempts.count, opened.request_id, attempts.earlier)
            with closing(opened):
                try:
                    for part in read_answers(opened.body(), request.n, self._max_body_bytes):
                        if isinstance(part, PartialImage):
                            yield part
                            continue
                        if any(item.image is None for item in part.items):
                            elsewhere.append((place, part))  # fetched later: the connection would not wait
                        else:
                            problems += part.problems
                            yield from self._completed(part, self._had(name, part.items, place), sent)
                            finished += len(part.items)
                        place += len(part.items)
                except UNREADABLE as error:
                    failure = opened.failure(error)
                if failure is not None:  # raised here, not above, so as not to show what httpx says
                    raise attempts.error(failure)
        lost: DownloadError | None = None
        guard.in_hand = opened.answer
        if elsewhere:
            guard.before_fetching()
        for first, part in elsewhere:
            problems += part.problems
            try:
                for event in self._completed(
                    part, self._had(name, part.items, first, patience, guard.stop), sent
                ):
                    yield event
                    finished += 1
            except DownloadError as error:
                lost = self._paid(error, attempts, opened)
        if lost is not None:
            raise lost
        self._warn(name, request.n, finished, problems)

    @staticmethod
    def _completed(
        part: Answer,
        images: Iterable[GeneratedImage],
        sent: tuple[int, str | None, tuple[Outcome, ...]],
    ) -> Iterator[CompletedImage]:
        attempts, request_id, earlier = sent
        for index, image in enumerate(images):
            yield CompletedImage(
                **vars(image),
                usage=None if index else part.usage,
                attempts=attempts,
                request_id=request_id,
                earlier_outcomes=earlier,
            )

    def _ask(self, request: ImageRequest, guard: Guard, number: int) -> tuple[Answer, Opened] | Failure:
        """Return the answer and what it was read from, or why there is none."""
        opened = self._transport.open(request.body(), guard, number)
        if isinstance(opened, Failure):
            return opened
        with closing(opened):
            try:
                return read_answer_of(opened.body(), request.n, self._max_body_bytes), opened
            except UNREADABLE as error:
                return opened.failure(error)

    def _had(
        self,
        name: str,
        items: Iterable[Item],
        first: int = 0,
        patience: float | None = None,
        stop: Stop | None = None,
        had: Collection[int] = (),
    ) -> Iterator[GeneratedImage]:
        """Yield the images of an answer, fetched where they came as URLs, each with its place in the answer.

        Args:
            first: the place of the first of `items`.
            had: places that are left out.

        Raises:
            DownloadError: after the others, where one could not be fetched.
        """
        lost: DownloadError | None = None
        over = self._clock.monotonic() + (PATIENCE if patience is None else patience)
        for index, item in enumerate(items, first):
            if index in had:
                continue
            left = over - self._clock.monotonic()  # where none is left, each is tried once
            fetch = partial(self._downloader.fetch, patience=left, stop=stop)
            try:
                spool, facts = item.image or fetch(item.url, f"{name} image {index}")
            except DownloadError as error:
                lost = lost or error  # the others are paid, too
                continue
            if facts.media_type not in PROMISED:
                log.warning(
                    "%s: image %d is %s, which the API does not promise", name, index, facts.media_type
                )
            yield GeneratedImage(spool=spool, index=index, revised_prompt=item.revised_prompt, **vars(facts))
        if lost is not None:
            raise lost

    @staticmethod
    def _paid(error: DownloadError, attempts: Attempts, opened: Opened) -> DownloadError:
        """Return the error with what is known of the request that was paid."""
        error.attempts, error.elapsed = attempts.count, attempts.elapsed
        error.request_id, error.answer = opened.request_id, opened.answer()
        return error

    @staticmethod
    def _warn(
        name: str, asked: int, came: int, problems: Iterable[str], lost: DownloadError | None = None
    ) -> None:
        fewer = [f"{asked} images were asked for, {came} came"] if came < asked else []
        if wrong := [*fewer, *problems, *([lost.message] if lost else [])]:
            log.warning("%s: %s", name, "; ".join(wrong))


def _all(had: Iterator[GeneratedImage]) -> tuple[tuple[GeneratedImage, ...], DownloadError | None]:
    """Return the images that can be had, and why others can't."""
    images = list[GeneratedImage]()
    try:
        images.extend(had)
    except DownloadError as error:
        return tuple(images), error
    return tuple(images), None
