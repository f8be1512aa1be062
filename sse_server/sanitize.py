"""Makes text and links from the database harmless before they leave the service.

Nothing else imports bleach.
"""

import html
import re
from html.entities import html5
from typing import Final
from urllib.parse import unquote

import bleach

# Limits

#: Times that bleach sees one message. Anything but a tag hidden inside a tag is gone after one.
BLEACH_PASSES: Final = 3

#: References inside references (``&#&#54;0;``) that are followed. Escaping a text many times
#: (``&amp;amp;lt;``) is no such nesting and has no limit.
REFERENCE_ROUNDS: Final = 8

#: Attributes that one message may have for bleach. html5lib compares each attribute of a tag with
#: all before it: 1,000 in one tag take 25 ms, on the event loop. What separates them is counted:
#: 2,000 characters of prose have about 350, of dense markup about 400.
MAX_SEPARATORS: Final = 500

#: Characters of a link; browsers and proxies begin to cut or refuse above this.
MAX_LINK_LENGTH: Final = 2_048

# WHATWG HTML, 13.2.5.6 "Tag open state": only these make a "<" more than text. A "<" at the very
# end is one as soon as a page continues with a letter.
_OPENING = re.compile(r"<(?=[A-Za-z/!?]|\Z)")

_SEPARATORS = re.compile(r"[\s/\"']+")

_ILL_FORMED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_REPLACEMENTS: Final[dict[int, str | None]] = {
    **dict.fromkeys((*range(0x09), *range(0x0E, 0x20), *range(0x7F, 0xA0))),
    **dict.fromkeys((0x0B, 0x0C, 0x0D, 0x85), "\n"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}

_ESCAPED_AMPERSANDS = re.compile("&(?:(?:amp|AMP|#0*38|#[xX]0*26);)+")
_REFERENCE = re.compile("&(?:#([0-9]+);?|#[xX]([0-9a-fA-F]+);?|([A-Za-z][A-Za-z0-9]*;?))")
_LEGACY_NAMES: Final = ("lt", "LT", "gt", "GT", "amp", "AMP", "quot", "QUOT")

_URL_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_ABSOLUTE = re.compile(r"https://([a-z0-9.-]+(?::[0-9]+)?|\[[0-9a-f:.]+\](?::[0-9]+)?)(?=[/?#]|\Z)")
_QUERY_OR_FRAGMENT = re.compile("[?#]")
_DOT_SEGMENT = re.compile(r"/(?:\.|%2e){1,2}(?=/|\Z)", re.IGNORECASE)
_STRIPPED_BY_BROWSERS = re.compile("[\x00-\x20]")


def plain_text(message: str) -> str:
    """Return the message as text that no HTML parser takes for markup.

    Tags and comments are removed and character references decoded, until there is nothing left
    to remove or decode: "Tom & Jerry, 3 < 4" stays as typed, ``&lt;b&gt;`` ends as ``<b>`` would.
    What bleach leaves because it is no complete tag is kept, with a space behind its ``<``.

    Guarantees, for every input:

    - No ``<`` is followed by an ASCII letter, ``/``, ``!`` or ``?``, or ends the text. So the
      result is inert between tags, also when it is decoded or pasted again.
    - Line ends are ``\\n``. Control characters are removed (bleach would print "?" for some of
      them, and only in texts that it sees), lone surrogates become U+FFFD.
    - ``plain_text(plain_text(x)) == plain_text(x)``.
    - bleach is called at most `BLEACH_PASSES` times. Texts that would need more, or that bleach
      would be slow on, keep remains of their tags as inert text.

    Args:
        message: Plain text, HTML, or text that was escaped any number of times.

    Returns:
        Plain text. It is not escaped: a ``&`` or ``<`` in it is meant to be seen.
    """
    text = _decoded(_well_formed(message))
    for _ in range(BLEACH_PASSES):
        # Nothing that begins after the last ">" is complete, but bleach would take "<!" for a
        # comment and drop the rest of the text.
        end = text.rfind(">") + 1
        text = text[:end] + _inert(text[end:])
        # Text in which no tag can begin (most has no "<" at all) bleach would only escape.
        if _OPENING.search(text) is None or not _quick_for_bleach(text):
            break
        stripped = _stripped(text)
        if stripped == text:
            break
        text = stripped
    # This line alone makes the text inert, whatever bleach did or was not asked to do.
    return _inert(text)


def safe_link(link: str | None, allowed_hosts: frozenset[str]) -> str | None:
    """Return the link if it cannot lead to a foreign site or run a script, else None.

    Two forms pass: a path on the application's own site (``/orders/17?tab=2``), and ``https://``
    with one of the allowed hosts. Both in the characters of RFC 3986 only, where browsers (WHATWG
    URL) and the RFC read a URL alike: whatever they would strip, map or repair (white space, a
    backslash, other alphabets, a missing slash) is refused instead.

    A path must also stay one when something on its way decodes it once too often or resolves it:
    ``/%2F/host``, ``/&#47;host`` and ``/.//host`` are refused.

    Args:
        link: As stored; anything.
        allowed_hosts: In lower case and ASCII (``xn--…``), with a port where one is meant
            (``app.example``, ``app.example:8443``, ``[2001:db8::1]``). Scheme and host of the
            link must be spelt just so; capitals are refused too.

    Returns:
        The link unchanged, or None.
    """
    if link is None or len(link) > MAX_LINK_LENGTH or _URL_CHARACTERS.fullmatch(link) is None:
        return None
    if link.startswith("/"):
        return link if _stays_on_site(link) else None
    absolute = _ABSOLUTE.match(link)
    if absolute is None or absolute[1] not in allowed_hosts:
        return None
    return link


def _inert(text: str) -> str:
    return _OPENING.sub("< ", text)


def _well_formed(text: str) -> str:
    if _ILL_FORMED.search(text) is None:
        return text
    return text.replace("\r\n", "\n").translate(_REPLACEMENTS)


def _decoded(text: str) -> str:
    """Decode character references until none is left.

    As a browser does in text, but of the names without a semicolon only those of ``<``, ``>``,
    ``&`` and ``"``, and not before a ``=``: the others are harmless, and decoding them would
    break addresses such as ``?a=1&copy=2&lt=3``.
    """
    for _ in range(REFERENCE_ROUNDS):
        if "&" not in text:
            return text
        decoded = _REFERENCE.sub(_character, _ESCAPED_AMPERSANDS.sub("&", text))
        if decoded == text:
            return text
        text = _well_formed(decoded)
    # Nobody types references nested this deep. Without "&" there is none, and none can form again.
    return text.replace("&", "")


def _character(reference: re.Match[str]) -> str:
    decimal, hexadecimal, name = reference.groups()
    if decimal is not None:
        # Eight digits are beyond Unicode already; int() refuses thousands of them.
        return html.unescape(f"&#{decimal.lstrip('0')[:8] or '0'};")
    if hexadecimal is not None:
        return html.unescape(f"&#x{hexadecimal.lstrip('0')[:8] or '0'};")
    if name in html5 and name.endswith(";"):
        return html5[name]
    for legacy in _LEGACY_NAMES:
        if name.startswith(legacy):
            rest = name[len(legacy) :]
            if not rest and reference.string.startswith("=", reference.end()):
                break
            return html5[legacy] + rest
    return reference[0]


def _stays_on_site(link: str) -> bool:
    path = _QUERY_OR_FRAGMENT.split(link, maxsplit=1)[0]
    if _DOT_SEGMENT.search(path) is not None:
        return False
    for _ in range(REFERENCE_ROUNDS):
        if link.startswith(("//", "/\\")):
            return False
        decoded = _STRIPPED_BY_BROWSERS.sub("", html.unescape(unquote(link)))
        if decoded == link:
            return True
        link = decoded
    return False


def _stripped(text: str) -> str:
    escaped: str = bleach.clean(text, tags=[], strip=True)
    return _decoded(escaped)


def _quick_for_bleach(text: str) -> bool:
    return len(_SEPARATORS.findall(text)) <= MAX_SEPARATORS
