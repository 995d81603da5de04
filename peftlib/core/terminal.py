"""Text of others on a terminal: shown, not obeyed."""

import io
import re

# Control characters but newline and tab, those of C1, marks that turn the direction of writing, and half characters.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text):
    r"""The text with what a terminal would act on as escapes that can be read, such as \x1b. Newlines and tabs stay."""
    return _ACTIVE.sub(_escape, text)


def _escape(found):
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def allow_odd(stream, errors):
    """From now on stdin or stdout handles what its encoding has not as `errors` says, instead of raising."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != errors:  # a notebook's own is none
        stream.reconfigure(errors=errors)
