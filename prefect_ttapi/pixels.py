"""Opening images without trusting them: the bytes are hostile until decoded."""

from __future__ import annotations

import os
import threading
from typing import BinaryIO, Final

from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from prefect_ttapi.errors import PictureError

#: No image larger than this is decoded. The largest that the vendor's models make has a tenth of it.
MAX_PIXELS: Final = 80_000_000

#: Images that this process has decoded at once, however many threads want to: more would take memory, not save time.
AT_WORK: Final = threading.BoundedSemaphore(os.cpu_count() or 1)

#: Opened by class, since `PIL.Image.open` warns of large images before one can look at their size, and
#: warnings are neither thread-safe to catch nor harmless where they are errors.
_READERS: Final[dict[bytes, type[ImageFile]]] = {
    b"\x89PNG": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
}


def opened(file: BinaryIO) -> ImageFile:
    """The image in `file`, read from where it stands, with nothing decoded yet.

    Raises:
        PictureError: it is no PNG, JPEG or WebP, or unfolds to more than `MAX_PIXELS`. A damaged one makes Pillow
            raise whatever it stumbles over.
    """
    start = file.tell()
    head = file.read(4)
    file.seek(start)
    reader = next((reader for magic, reader in _READERS.items() if head.startswith(magic)), None)
    if reader is None:
        raise PictureError("the file is no PNG, JPEG or WebP")
    image = reader(file)
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(
            f"the image is {image.width} x {image.height} pixels; {MAX_PIXELS:,} are the limit"
        )
    return image
