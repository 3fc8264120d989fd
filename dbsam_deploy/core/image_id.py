"""The name of an image's content: what a client asks for, and what the server keeps by."""

from __future__ import annotations

import hashlib

import numpy as np

from .imaging import ByteArray


def image_id(image: ByteArray) -> str:
    """SHA-256 of size and pixels, in hexadecimal.

    Args:
        image: (H, W, 3) uint8 RGB.
    """
    digest = hashlib.sha256(f"{image.shape[0]}x{image.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()
