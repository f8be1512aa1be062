"""Messages become plain text and links lead nowhere foreign, whatever is in them."""

import html
import re
import time
from html.parser import HTMLParser
from typing import Any

import bleach
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typing_extensions import override

from sse_server import sanitize
from sse_server.sanitize import plain_text, safe_link
from tests.xss_vectors import ESCAPED, VECTORS

LINE_BREAKS = "\r\v\f\x85"
CONTROLS = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - {"\t", "\n"}

# Strategies

clean_characters = st.characters(exclude_categories=["Cs"], exclude_characters=sorted(CONTROLS))
#: Any characters, ill-formed ones included, but none that markup is made of.
without_markup = st.text(st.characters(exclude_characters="<>&"))
#: What people type: markup characters where they mean nothing.
harmless = st.lists(
    st.one_of(
        st.text(clean_characters.filter(lambda c: c not in "<&")),
        st.sampled_from(["< ", "<3", "<=", "<-", "<<1", "é<é", "& ", "&&", "&1", "&=", "&;", ">"]),
        st.sampled_from(["?a=1&copy=2", "&lt=3&gt=4", "&amp=x", "R&D", "&unknown;", "&nosuch&"]),
    )
).map(lambda parts: "".join(f"{part} " for part in parts))
hostile = st.lists(
    st.one_of(
        st.text(max_size=5),
        st.sampled_from(VECTORS),
        st.sampled_from(list("<>&;#/!?=\"'`- \t\n\r\f\0\x01\x85abx063")),
        st.sampled_from(["lt", "gt", "amp", "#60", "#x3c", "num", "semi", "sol", "excl", "3c"]),
        st.sampled_from(["&lt", "&lt;", "&#60;", "&amp;", "&#38;", "&num;", "&semi;", "&#&#54;0;"]),
        st.sampled_from(
            ["<b>", "</b>", "<svg ", "<a\tx='", "script>", "<!--", "-->", "]]>", "\r\n"]
        ),
    ),
    max_size=30,
).map("".join)


class _Markup(HTMLParser):
    """Collects everything that is not text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append(tag)

    @override
    def handle_endtag(self, tag: str) -> None:
        self.found.append(f"/{tag}")

    @override
    def handle_comment(self, data: str) -> None:
        self.found.append(f"!--{data}")

    @override
    def handle_decl(self, decl: str) -> None:
        self.found.append(f"!{decl}")

    @override
    def handle_pi(self, data: str) -> None:
        self.found.append(f"?{data}")

    @override
    def unknown_decl(self, data: str) -> None:
        self.found.append(f"![{data}")


def markup_in(text: str) -> list[str]:
    parser = _Markup()
    parser.feed(text)
    parser.close()
    return parser.found


def assert_inert(text: str) -> None:
    """Fails if a page that decodes and pastes the text, any number of times, gets markup."""
    while True:
        assert re.search(r"<(?:[A-Za-z/!?]|\Z)", text) is None
        assert markup_in(text) == []
        assert markup_in(f"<p>{text}</p><b>x</b>") == ["p", "/p", "b", "/b"]
        assert markup_in(f"<p>{text}script>alert(1)</p>") == ["p", "/p"]
        decoded = html.unescape(text)
        if decoded == text:
            return
        text = decoded


# Text


@pytest.mark.parametrize(
    "message",
    [
        "",
        "Your order 17 has shipped.",
        "Tom & Jerry, 3 < 4",
        "3 > 2 & 1 < 2; R&D",
        "I <3 you, a<=b, x<-y, << >>",
        "https://shop.example/?a=1&copy=2&lt=3&gt=4&amp=5&reg=6",
        "&; &# &#x &1; &unknown; &unknown && &",
        "line\nline\ttab  two spaces ",
        " leading and trailing ",
        "Ünïcödé, 日本語, العربية, \u202eעברית\u202c, 👩\u200d👩\u200d👧",
        "quotes: \"double\", 'single', `back`",
        "{{mustache}} ${template} %3Cb%3E \\x3cb\\x3e",
        "\ufeff \u2028 \u2029 \ufffe \U0010ffff",
    ],
)
def test_what_people_type_arrives_as_typed(message: str) -> None:
    """Text that no parser takes for markup is not changed by one character."""
    assert plain_text(message) == message


@pytest.mark.parametrize(
    "message, expected",
    [
        # Tags
        ("<b>bold</b> move", "bold move"),
        ("<b onmouseover=alert(1)>x</b>", "x"),
        ("a <br/> b", "a  b"),
        ("<div>one</div><div>two</div>", "one\ntwo"),
        ("<script>alert(1)</script>", "alert(1)"),
        ("<!-- comment -->x", "x"),
        ("<scr\x00ipt>x</script>", "x"),
        ("<<b>b>x", "x"),
        # References
        ("R&amp;D &copy; 2024", "R&D © 2024"),
        ("&lt;script&gt;x&lt;/script&gt;", "x"),
        ("&amp;amp;amp;lt;b&amp;amp;amp;gt;x", "x"),
        ("&ltb&gtx &LTb&GTx", "x x"),
        ("&#60;b&#x3E;x &#0060b&#X03Ex", "x x"),
        ("&&num;60;b>x", "x"),
        ("&#&#54;0;b>x", "x"),
        ("&ampamp;lt;b>x", "x"),
        ("&l<i>t;b>x", "x"),
        ("&quot;x&quot; &apos;&#39;&#x27;", "\"x\" '''"),
        ("&lt3 &ltltimes;", "<3 < ltimes;"),
        ("&ltimes;", "⋉"),
        ("&#0;&#xD800;&#x110000;&#99999999999;", "\ufffd" * 4),
        ("&#" + "9" * 5_000 + ";", "\ufffd"),
        ("&#x80;&#133;", "€…"),
        # What is no tag stays, apart from its "<"
        ("x <y and z", "x < y and z"),
        ("<svg/onload=alert(1)//", "< svg/onload=alert(1)//"),
        ("<svg onload=alert(1)//<b>x", "x"),
        ("broken </3", "broken < /3"),
        ("important <!", "important < !"),
        ("<?php", "< ?php"),
        ("<!-- no end", "< !-- no end"),
        ("ends with <", "ends with < "),
        ("<<<b", "<<< b"),
        # Control characters
        ("a\r\nb\rc\vd\fe\x85f", "a\nb\nc\nd\ne\nf"),
        ("a\x00b\x07c\x1b[31md\x7fe\x9bf", "abc[31mdef"),
        ("a\r\nb & <i>c</i>\x01\r\n", "a\nb & c\n"),
        ("a&#13;b&#1;c&#27;d", "a\nbcd"),
        ("\ud83d\n", "\ufffd\n"),
    ],
)
def test_what_becomes_of_markup(message: str, expected: str) -> None:
    """Tags go, references are decoded, and what only looks like a tag is kept as text."""
    assert plain_text(message) == expected
    assert_inert(expected)


@pytest.mark.parametrize("vector", VECTORS)
def test_known_injections_are_inert(vector: str) -> None:
    """A known injection ends as text, once and when it is sanitised, decoded or pasted again."""
    text = plain_text(vector)
    assert_inert(text)
    assert plain_text(text) == text


@given(harmless)
@example("Tom & Jerry, 3 < 4")
def test_harmless_text_is_unchanged(message: str) -> None:
    """Markup characters that mean nothing where they stand are kept."""
    assert plain_text(message) == message


@given(hostile)
@example("<" * 500 + "b>" * 500)
def test_the_result_is_inert(message: str) -> None:
    """No input yields text that a parser takes for markup, however often it is decoded."""
    text = plain_text(message)
    assert_inert(text)
    assert CONTROLS.isdisjoint(text)
    text.encode()


@given(hostile)
def test_sanitising_twice_changes_nothing(message: str) -> None:
    """A message that was sanitised before it was stored arrives the same."""
    text = plain_text(message)
    assert plain_text(text) == text


@given(without_markup)
@example("a\r\nb\rc\x00\x01\x0b\x0c\x1b\x85\ud800\ufffe")
def test_the_fast_path_changes_nothing(message: str) -> None:
    """Text without markup characters does not go to bleach, and bleach would not change it."""
    text = plain_text(message)
    assert sanitize._stripped(text) == text
    assert sanitize._stripped(sanitize._well_formed(message)) == text


@given(harmless | hostile.map(plain_text))
def test_bleach_changes_nothing_where_no_tag_can_begin(message: str) -> None:
    """Text with "<" and "&" that cannot be markup need not be parsed either."""
    assert sanitize._stripped(message) == message


@given(st.text(clean_characters))
def test_escaped_text_arrives_as_it_was_before_escaping(message: str) -> None:
    """A backend that escapes, once or often, is understood; the text is sanitised all the same."""
    assert plain_text(html.escape(message)) == plain_text(message)
    assert plain_text(html.escape(html.escape(html.escape(message)))) == plain_text(message)


@pytest.mark.parametrize(
    "message", ["x" * 2_000, "Tom and Jerry\r\n\x00", "3 < 4 & 5 > 4", "x <y", "&lt;3", "&copy;"]
)
def test_bleach_is_left_out_where_nothing_can_be_a_tag(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ordinary message costs microseconds."""

    def unexpected(*_: object, **__: object) -> str:
        raise AssertionError("bleach was called")

    monkeypatch.setattr(bleach, "clean", unexpected)
    assert_inert(plain_text(message))


# Limits


def attributes(count: int, separator: str = " ") -> str:
    return separator.join(chr(0x4E00 + number) for number in range(count))


ADVERSARIAL = {
    "escaped 490 times": "&" + "amp;" * 490 + "lt;b>x",
    "escaped without semicolons": "&" + "ampamp" * 320 + "lt;b>x",
    "references inside references": "&#" * 500 + "5" + "3;" * 490 + "4;0;b>",
    "references": "&#x26;" * 333,
    "split references": "&&num;38&semi;" * 140,
    "long number": "&#" + "0" * 1_990 + "60;",
    "tags inside tags": "<" * 600 + "b>" * 650,
    "tags around tags": "<b" * 600 + ">" * 650,
    "only <": "<" * 1_999 + "b",
    "stray end tags": "</a " * 499 + ">",
    "unclosed tags": "<a " * 660,
    "one tag with 990 attributes": f"<a {attributes(990)}>",
    "unclosed attributes behind hidden tags": f"<<<<b>b>b>b><a {attributes(490)} x='>",
    "too many attributes behind hidden tags": f"<<<<b>b>b>b><a {attributes(980)} x='>",
    "slashes": f"<<<<b>b>b>b><a {attributes(980, '/')}/='>",
    "quotes": f"<<<<b>b>b>b><a {attributes(980, chr(34))}>",
    "comments": "<!--" * 490 + "-->",
    "declarations": "<![CDATA[" * 220 + "]]>",
}


@pytest.mark.parametrize("message", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_no_message_holds_the_event_loop(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst known texts of 2,000 characters are inert after a bounded amount of work."""
    passes = []
    clean = bleach.clean

    def counted(text: str, **options: Any) -> str:
        passes.append(text)
        return clean(text, **options)

    monkeypatch.setattr(bleach, "clean", counted)
    assert len(message) <= 2_000
    assert_inert(plain_text(message))
    assert len(passes) <= sanitize.BLEACH_PASSES

    durations = []
    for _ in range(3):
        start = time.process_time()
        plain_text(message)
        durations.append(time.process_time() - start)
    # 8 ms at most on the machine this was written on, when it is idle.
    assert min(durations) < 0.1


def test_a_tag_with_too_many_attributes_is_kept_from_bleach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A text that html5lib needs quadratic time for is made inert without it."""
    monkeypatch.setattr(bleach, "clean", None)
    message = f"<a {attributes(sanitize.MAX_SEPARATORS + 1)}>x"
    assert plain_text(message) == f"< {message[1:]}"


def test_text_escaped_hundreds_of_times_is_decoded() -> None:
    """Repeated escaping has no limit, and does not come near the one for nested references."""
    assert plain_text("&" + "amp;" * 400 + "lt;3") == "<3"
    assert plain_text("&" + "#38;" * 400 + "#60;3") == "<3"


def test_references_nested_too_deep_lose_their_ampersands() -> None:
    """What is not decoded to its end cannot be decoded by anybody else either."""
    deep = next(vector for vector in ESCAPED if vector.startswith("&#&#&#"))
    assert "&" not in plain_text(deep)


def test_every_reference_is_longer_than_what_it_stands_for() -> None:
    """Decoding always shortens a text, so it ends."""
    for name, characters in html.entities.html5.items():
        assert len(characters) <= len(name)


# Links

HOSTS = frozenset({"app.example", "cdn.example:8443", "xn--bcher-kva.example", "[2001:db8::1]"})


@pytest.mark.parametrize(
    "link",
    [
        "/",
        "/orders/17",
        "/orders/17?tab=2&copy=1#top",
        "/a-b_c~d/e.f/..g/...",
        "/search?q=caf%C3%A9+%26+bar%5C&next=//x",
        "/search?next=https://evil.example/",
        "/#/route",
        "/user:17@x/(a)/it's/*!$,;=",
        "/files/100%25",
        "/a//b",
        "/items?a[]=1",
        "https://app.example",
        "https://app.example/",
        "https://app.example?x=1",
        "https://app.example#x",
        "https://app.example/a/../b?c=@evil.example",
        "https://app.example//evil.example/",
        "https://cdn.example:8443/x",
        "https://xn--bcher-kva.example/x",
        "https://[2001:db8::1]/x",
        "/" + "x" * 2_047,
    ],
)
def test_links_that_pass(link: str) -> None:
    """Paths of the application and pages of the allowed hosts arrive unchanged."""
    assert safe_link(link, HOSTS) == link


@pytest.mark.parametrize(
    "link",
    [
        None,
        "",
        " ",
        "x",
        "orders/17",
        "./x",
        "../x",
        "?x=1",
        "#x",
        # Schemes
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        " javascript:alert(1)",
        "\x01javascript:alert(1)",
        "java\tscript:alert(1)",
        "java\nscript:alert(1)",
        "javascript&colon;alert(1)",
        "&#106;avascript:alert(1)",
        "javascript%3Aalert(1)",
        "javascript://app.example/%0aalert(1)",
        "data:text/html,<script>alert(1)</script>",
        "data:text/html;base64,PHNjcmlwdD4=",
        "vbscript:x",
        "blob:https://app.example/x",
        "file:///etc/passwd",
        "http://app.example/",
        "ftp://app.example/",
        "wss://app.example/",
        "view-source:https://app.example/",
        "feed:https://app.example/",
        "HTTPS://app.example/",
        "https:",
        "https:/",
        "https://",
        "https:///",
        "https:/app.example/",
        "https:app.example/",
        "https:///app.example/",
        "https:\\\\app.example/",
        "https:/\\app.example/",
        "https://\\app.example/",
        " https://app.example/",
        "https://app.example/ ",
        "https://app.example/\n",
        "https ://app.example/",
        "ht\ttps://app.example/",
        # Hosts
        "//evil.example",
        "//app.example",
        "///evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "\\/evil.example",
        "/\t/evil.example",
        "/\n/evil.example",
        "/\r/evil.example",
        "\t//evil.example",
        "/ /evil.example",
        "https://evil.example/",
        "https://App.Example/",
        "https://app.example.evil.example/",
        "https://evil.example/app.example",
        "https://evil.example?app.example",
        "https://evil.example#app.example",
        "https://evil.example\\@app.example/",
        "https://evil.example\\.app.example/",
        "https://app.example\\.evil.example/",
        "https://app.example@evil.example/",
        "https://app.example:x@evil.example/",
        "https://user@app.example/",
        "https://user:password@app.example/",
        "https://@app.example/",
        "https://:@app.example/",
        "https://app.example:443/",
        "https://app.example:8443/",
        "https://app.example:/",
        "https://cdn.example/",
        "https://cdn.example:08443/",
        "https://app.example./",
        "https://.app.example/",
        "https://sub.app.example/",
        "https://xapp.example/",
        "https://app.example,evil.example/",
        "https://app.example;evil.example/",
        "https://app.example&evil.example/",
        "https://app%2eexample/",
        "https://app.example%2eevil.example/",
        "https://app.example%00.evil.example/",
        "https://app.example%40evil.example/",
        "https://app.exam\tple/",
        "https://app\u3002example/",
        "https://app\uff0eexample/",
        "https://app\u2024example/",
        "https://evil.example\u2044.app.example/",
        "https://evil.example\uff0f.app.example/",
        "https://evil.example\u2100.app.example/",
        "https://ａpp.example/",
        "https://аpp.example/",
        "https://app.e\u00adxample/",
        "https://app.e\u200bxample/",
        "https://bücher.example/",
        "https://[2001:db8::2]/",
        "https://[2001:DB8::1]/",
        "https://2130706433/",
        # Paths that turn into something else on their way
        "/%2Fevil.example",
        "/%2f%2fevil.example",
        "/%252Fevil.example",
        "/%5Cevil.example",
        "/%5cevil.example",
        "/%09/evil.example",
        "/%0d%0a/evil.example",
        "/%20/evil.example",
        "/&#47;evil.example",
        "/&#x2f;evil.example",
        "/&sol;evil.example",
        "/&bsol;evil.example",
        "/&Tab;/evil.example",
        "/%26%2347;evil.example",
        "/&percnt;2Fevil.example",
        "/.//evil.example",
        "/..//evil.example",
        "/x/..//evil.example",
        "/%2e%2e//evil.example",
        "/x/%2E.//evil.example",
        "/./x",
        "/..",
        "/%" + "25" * 500 + "2Fevil.example",
        # Characters
        "/a b",
        "/a\x00b",
        "/a\x7fb",
        "/a\nb",
        "/a\\b",
        '/"onmouseover=alert(1)',
        "/<script>alert(1)</script>",
        "/`x`",
        "/{{x}}",
        "/a|b^c",
        "/\uff0fevil.example",
        "/\u2215evil.example",
        "/\u202egro.elpmaxe",
        "/café",
        "/\ud800",
        # Length
        "/" + "x" * 2_048,
        "https://app.example/" + "x" * 2_048,
    ],
)
def test_links_that_are_dropped(link: str | None) -> None:
    """A link that could lead elsewhere, run a script or be read in two ways is dropped."""
    assert safe_link(link, HOSTS) is None


@pytest.mark.parametrize(
    "entry, link",
    [
        ("", "https:///evil.example/"),
        ("", "https://"),
        ("evil.example\\", "https://evil.example\\/"),
        ("x@evil.example", "https://x@evil.example/"),
        ("App.example", "https://App.example/"),
        ("bücher.example", "https://bücher.example/"),
        ("*", "https://*/"),
        ("evil.example/", "https://evil.example/"),
    ],
)
def test_a_careless_allowed_host_opens_nothing(entry: str, link: str) -> None:
    """An entry that is no host in lower-case ASCII allows no link."""
    assert safe_link(link, frozenset({entry})) is None


def test_without_allowed_hosts_only_paths_pass() -> None:
    """Nothing is allowed by default but the application itself."""
    assert safe_link("https://app.example/", frozenset()) is None
    assert safe_link("/x", frozenset()) == "/x"


@given(st.text(st.sampled_from("abcxyzABC0189-_~")), st.text(st.sampled_from("abc019=&+-_.~:@/?!")))
def test_ordinary_paths_pass(segment: str, query: str) -> None:
    """Letters, digits and the usual signs in a path, anything of a URL in a query."""
    link = f"/x{segment}/{segment}?{query}#{segment}"
    assert safe_link(link, HOSTS) == link
    assert safe_link(f"https://app.example{link}", HOSTS) == f"https://app.example{link}"


@given(st.text() | st.text(st.sampled_from("/\\:@.?#%&;25fFcCeE \t\nhtpsaexmlv[]")))
def test_what_passes_is_plain_and_unchanged(link: str) -> None:
    """Nothing is repaired: a link is what it was, in printable ASCII, or dropped."""
    for candidate in (link, f"/{link}", f"https://{link}", f"https://app.example{link}"):
        result = safe_link(candidate, HOSTS)
        assert result in (None, candidate)
        if result is not None:
            assert result.isascii()
            assert result.isprintable()
            assert not {" ", "\\", '"', "<", ">", "`"} & set(result)
            assert re.match(
                r"/(?![/\\])|https://(app\.example|cdn\.example:8443)(?=[/?#]|\Z)", result
            )
