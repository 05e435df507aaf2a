from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.storage import is_url, url_fault

WORDS = st.text(string.ascii_letters + string.digits + "-_.~%", min_size=8, max_size=20)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/folder/file.jsonl",
        "gs://bucket/folder/",
        "abfs://container@account.dfs.core.windows.net/folder",  # a place within an account, not a user
        "file:///mnt/archive/run",
    ],
)
def test_urls_of_stores_are_taken(url: str) -> None:
    assert is_url(url) and url_fault(url) is None


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("s3://", "names no place"),
        ("s3:///", "names no place"),
        ("://bucket/x", "is not PROTOCOL://PLACE/NAME"),
        ("simplecache::s3://bucket/x", "without a chain"),
        ("zip://a.txt::s3://bucket/x.zip", "without a chain"),
        ("https://bucket.example/x.jsonl", "is a web page"),
        ("s3://bucket/x?X-Amz-Signature=abc", "has a query"),
        ("s3://bucket/../other", "'.' or '..' between slashes"),
        ("s3://bucket/x#y", "has a query, a fragment"),
        ("s3://bucket/x\ny", "control character"),
    ],
)
def test_other_urls_are_refused_in_words(url: str, what: str) -> None:
    fault = url_fault(url)
    assert fault is not None and what in fault[0] and fault[1]


@given(user=WORDS, password=WORDS, bucket=WORDS)
def test_a_password_is_refused_and_never_repeated(user: str, password: str, bucket: str) -> None:
    fault = url_fault(f"s3://{user}:{password}@{bucket}/x")
    assert fault is not None and "password" in fault[0] and "AWS_PROFILE" in fault[1]
    assert not any(password in part for part in fault)


@pytest.mark.parametrize("path", ["corpus.txt", "/a/b", "stdlib", "c:/x", "a:b"])
def test_paths_are_no_urls(path: str) -> None:
    assert not is_url(path)
