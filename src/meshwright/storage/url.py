"""URLs of stores as words: which text is one, and what is wrong with it. Loads nothing."""

from __future__ import annotations

import re

_FORM = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(/.*)?", re.DOTALL)
#: Protocols of web pages: they cannot be listed, so nothing says whether they are what they were.
_PAGES = ("http", "https", "ftp")
_EXAMPLE = "for example s3://bucket/folder"


def is_url(text: str) -> bool:
    """Whether a text is meant as a URL and not as a path of this machine."""
    return "://" in text


def url_fault(url: str) -> tuple[str, str] | None:
    """What is wrong with the form of a URL, and the nearest that works; None if nothing is.

    The words never repeat the URL, which may hold a password.
    """
    form = _FORM.fullmatch(url)
    if "::" in url or form is None:
        return "is not PROTOCOL://PLACE/NAME: one store, without a chain of others", _EXAMPLE
    protocol, place, _ = form.groups()
    if ":" in place.rpartition("@")[0]:
        near = "leave it out: credentials come from the store's own variables and files, such as AWS_PROFILE"
        return "holds a user and a password, which would be written into logs and job.toml", near
    if any(ord(letter) < 32 for letter in url) or "?" in url or "#" in url:
        return "has a query, a fragment or a control character, which the name of an object here has not", _EXAMPLE
    if protocol.lower() in _PAGES:
        what = "is a web page, which cannot be listed or held to what it was, so a run could not be resumed or repeated"
        return what, "save it to a file first, or put it into a store such as s3://bucket/folder"
    if {".", ".."} & set(url.split("/")):
        return "has '.' or '..' between slashes, which a store does not follow", _EXAMPLE
    if not url.partition("://")[2].strip("/"):
        return "names no place in the store", _EXAMPLE
    return None
