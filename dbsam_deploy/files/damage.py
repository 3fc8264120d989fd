"""What reading a damaged file raises, and that in one line."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib

DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""Which one it is depends on the byte that is wrong and on the library that trips over it."""

LONGEST_REASON = 300


def reason_of(error: BaseException) -> str:
    """What an error says, in one line that a terminal shows; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(char for char in text if char.isprintable())[:LONGEST_REASON]
