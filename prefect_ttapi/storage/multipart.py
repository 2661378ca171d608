"""A big object sent to S3 in parts: whole in the end, or not there at all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.arguments import tag_in
from prefect_ttapi.storage.objects import Body
from prefect_ttapi.storage.parts import Part
from prefect_ttapi.storage.service import Service


class Steps(Protocol):
    """Tries an attempt for `patience` seconds, and names the object where it fails."""

    async def __call__(self, attempt: Any, patience: float = ...) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Upload:
    """One upload. The condition is judged at its end, when the object appears.

    Attributes:
        place: bucket and key, and what is said of the object.
        conditions: what has to be at the key, as the last request says it.
        look: raises ConflictError where something else is there.
    """

    service: Service
    steps: Steps
    place: Mapping[str, Any]
    conditions: Mapping[str, str]
    look: Callable[[], Awaitable[None]]

    async def send(self, body: Body, parts: Sequence[Part], patience: float) -> str:
        """Send one part after the other, read from the body as they go; the new object's tag.

        What fails is given up, and leaves neither an object nor parts. The last request is sent once, since its
        answer tells who was first.
        """
        begun = await self.steps(lambda: self.service.call("create_multipart_upload", **self.place))
        upload = {name: self.place[name] for name in ("Bucket", "Key")} | {"UploadId": begun["UploadId"]}
        try:
            sent = [
                await self.steps(partial(self._send_part, upload, body, number, part), patience)
                for number, part in enumerate(parts, 1)
            ]
            # Ceph takes no heed of conditions on the last request: this leaves milliseconds
            await self.look()
            whole = {"MultipartUpload": {"Parts": sent}} | dict(self.conditions)
            answer = await self.steps(
                lambda: self.service.call("complete_multipart_upload", **upload, **whole), 0
            )
        except BaseException:
            with suppress(StoreError):  # the error that led here says more
                await self.steps(lambda: self.service.call("abort_multipart_upload", **upload))
            raise
        return tag_in(answer)

    async def _send_part(
        self, upload: Mapping[str, Any], body: Body, number: int, part: Part
    ) -> dict[str, Any]:
        with part.open(body) as stream:
            answer = await self.service.call(
                "upload_part", **upload, PartNumber=number, Body=stream, ContentMD5=part.content_md5
            )
        return {"PartNumber": number, "ETag": answer["ETag"]}
