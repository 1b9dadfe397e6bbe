"""Hypothesis strategies that damage JSON documents, texts and bytes."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[Any, ...]
DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]

# Values that often break programs.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 255, 4096, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    10**9, 10**12, 10**400, 0.0, -0.0, 0.5, -1.5, 1e-45, 1e30, -1e300, float("nan"), float("inf"), -float("inf"),
    "", "0", "64", "true", "None", "nan", "..", "../config.json", "/etc/passwd", "a/b", "\0", "\ud800", "\x1b[31m",
    "x" * 5000, "{{ 7 * 7 }}", "%s%n", [], [[]], [0], [1, 2, 3], [-1], [None], ["a"], [2**70], {}, {"a": {}},
    {"0": 0}, DEEP,
)  # fmt: skip
WORDS = (
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r\n", b'"', b"\\", b"{", b"}", b"[", 
    b"]", b",", b":", b"NaN", b"Infinity", b"-", b"1e999", b"9" * 30, b"9" * 5000, b"[" * 100_000, b"null", b"\\ud800",
    b"\\u0000", b"/*", b"\x1b[2J", b"(" * 1000, b"%x", b"=", b";",
)  # fmt: skip


def values() -> st.SearchStrategy[Any]:
    """A JSON value, most often a copy of one of the above: a further change of a document may edit it in place."""
    one = st.sampled_from(VALUES).map(copy.deepcopy)
    return st.one_of(one, one, st.integers(-100, 100), st.floats(), st.text(max_size=6), st.lists(one, max_size=3))


def places(document: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every value in a JSON document, except the document itself."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def damaged_json(document: Any, *, most: int = 2, names: tuple[str, ...] = ()) -> st.SearchStrategy[Any]:
    """The document with one to `most` values replaced, removed or renamed. names: keys to rename to or to add."""
    known = list(places(document))
    change = st.tuples(
        st.sampled_from(known),
        st.sampled_from(("replace", "replace", "replace", "replace", "remove", "rename", "add")),
        values(),
        st.sampled_from(names or ("a", "", "../a", "__metadata__", "weight_map")),
    )
    return st.lists(change, min_size=1, max_size=most).map(lambda changes: _changed(document, changes))


def _changed(document: Any, changes: list[tuple[Path, str, Any, str]]) -> Any:
    made = copy.deepcopy(document)
    for path, action, value, name in changes:
        holder = made
        try:
            for key in path[:-1]:
                holder = holder[key]
            if action == "remove":
                del holder[path[-1]]
            elif action == "rename":
                holder[name] = holder.pop(path[-1])
            elif action == "add":
                holder[name] = value
            else:
                holder[path[-1]] = value
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # removed by an earlier change
    return made


def as_json(document: Any) -> bytes:
    """Encodes a document; NaN, Infinity and lone surrogates are allowed."""
    return json.dumps(document).encode()


def damaged_bytes(whole: bytes, *, most: int = 3) -> st.SearchStrategy[bytes]:
    """The bytes with parts removed and others inserted at one to `most` positions; sometimes truncated."""
    size = len(whole)
    change = st.tuples(
        st.integers(0, size), st.integers(0, 12), st.one_of(st.binary(max_size=8), st.sampled_from(WORDS))
    )
    edited = st.lists(change, min_size=1, max_size=most).map(lambda changes: _edited(whole, changes))
    return st.one_of(edited, edited, edited, st.integers(0, max(size - 1, 0)).map(lambda end: whole[:end]))


def _edited(whole: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for begin, length, put in changes:
        whole = whole[:begin] + put + whole[begin + length :]
    return whole


def damaged_text(whole: str, *, most: int = 3, words: tuple[str, ...] = ()) -> st.SearchStrategy[str]:
    """The text with one to `most` parts replaced. words: further replacements."""
    size = len(whole)
    put = st.one_of(
        st.text(max_size=4),
        st.text(alphabet='%"()[]{}=,;:.-+01an x\n\\', max_size=4),
        st.sampled_from((*words, "9" * 5000, "\ud800", "\0", "[" * 500, "1e999", "-1", "nan", "_", "\x1b[2J")),
    )
    change = st.tuples(st.integers(0, size), st.integers(0, 8), put)

    def edit(changes: list[tuple[int, int, str]]) -> str:
        text = whole
        for begin, length, new in changes:
            text = text[:begin] + new + text[begin + length :]
        return text

    return st.lists(change, min_size=1, max_size=most).map(edit)
