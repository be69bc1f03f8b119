"""Finds the encoding of a text file, and the place of bytes that it does not allow."""

import codecs
import re

from ray_jobs.config.errors import JobError
from ray_jobs.prepare.table_files.file_format import RawFile

_BLOCK_BYTES = 1 << 20
_CONTEXT_BYTES = 1 << 15
_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# What Western text in cp1252 rarely has: letters in place of Turkish ones, three special letters in
# a row, a capital or an inverted mark inside a word, a raised sign before a letter, and most signs.
_NOT_WESTERN = re.compile(
    r"[ÐÝÞðýþ]|[À-ÿŠŽŒšžœŸ]{3}|[a-zß-ÿ][À-ÞŠŽŒŸ¡¿]|[¹²³ªº][a-zß-ÿ]"
    r"|[^\0-\x7fÀ-ÿŠŽŒšžœ\xa0°±µ€£§²³¼½×ªº¡¿–—‘’‚“”„«»…©®™·•]"
)
_ENCODINGS = (
    "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "koi8_r",
    "mac_roman", "cp850", "cp932", "euc_jp", "gb18030", "big5", "cp949",
)  # fmt: skip
_BYTES_WORD = re.compile(rb"[^\s,;|\"]*[\x80-\xff][^\s,;|\"]*")
_WORD = re.compile(r"\w*[^\W\d_a-zA-Z²³]\w*")


def detect_encoding(head: bytes) -> str:
    """Return the Unicode encoding of a file with these first bytes, by default UTF-8."""
    for bom, name in _BOMS.items():
        if head.startswith(bom):
            return name
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) // 10 and min(even, odd) <= max(even, odd) // 20:
        return "utf-16-be" if even > odd else "utf-16-le"
    return "utf-8"


def guess_encoding(file: RawFile, encoding: str) -> tuple[str, str]:
    """Return another encoding for a file with bytes that are invalid in one, and a note.

    Raises:
        JobError: If the file is damaged, or its encoding is unclear. The message has the place.
    """
    place, context = _find_invalid(file, encoding)
    is_text = context and b"\0" not in context
    if is_text and encoding == "utf-8" and (guess := _guess(context)):
        word = _WORD.search(context.decode(guess, "replace"))
        example = f", such as {word[0]!r}; if that is wrong, save it as UTF-8" if word else ""
        return guess, f"read as {guess}{example}"
    raise JobError(
        f"the table {file.name} could not be read: {place}: invalid in {encoding}; correct the "
        "text and save it as UTF-8, or export the table as CSV, Parquet, JSON or Excel"
    )


def _find_invalid(file: RawFile, encoding: str) -> tuple[str, bytes]:
    """Return the place of the first invalid bytes, and the bytes around it.

    There are no bytes if other text is valid but not ASCII, so that the encoding is right.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    line, character, is_ascii, invalid = 1, 1, True, None
    with file.open() as stream:
        while invalid is None and (block := stream.read(_BLOCK_BYTES)):
            try:
                text = decoder.decode(block)
            except UnicodeDecodeError as error:
                invalid = error
                text = error.object[: error.start].decode(encoding, "replace")
            is_ascii = is_ascii and text.isascii()
            line += text.count("\n")
            newline = text.rfind("\n")
            character = character + len(text) if newline < 0 else len(text) - newline
    context = b""
    if invalid and is_ascii:
        start = max(invalid.start - _CONTEXT_BYTES, 0)
        context = invalid.object[start : invalid.start + _CONTEXT_BYTES]
        text = re.sub(r"[\0-\x7f]", "", context.decode(encoding, "replace"))
        if text.count("\ufffd") < len(text) / 2:
            context = b""
    return f"line {line:,}, character {character:,}", context


def _guess(context: bytes) -> str | None:
    if not _NOT_WESTERN.search(context.decode("cp1252", "replace")):
        return "cp1252"
    from charset_normalizer import from_bytes

    words = b" ".join(dict.fromkeys(_BYTES_WORD.findall(context))) + b" "
    # Detection is more reliable in longer text, and sometimes finds nothing in it.
    for sample in (words * (1 + 500 // len(words)), words):
        if best := from_bytes(sample, cp_isolation=[*_ENCODINGS]).best():
            return best.encoding
    return None
