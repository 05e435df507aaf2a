"""Objects in a store that a URL names, such as s3://bucket/folder; `fsspec` is loaded where one is opened, not before.

is_url, url_fault   what counts as a URL, and what is wrong with one, without loading anything
open_store          the objects below a URL: list, read, write, upload, download
kept_in_store       copies a run's checkpoints into a store while it is trained
bring_back          fetches from there what a resume needs
local_model         a model's folder on this machine, downloaded where a URL names it
"""

from meshwright.storage.model import local_model
from meshwright.storage.run_copy import RunCopy, bring_back
from meshwright.storage.store import Entry, Store, open_store
from meshwright.storage.uploads import kept_in_store
from meshwright.storage.url import is_url, url_fault

__all__ = [
    "Entry",
    "RunCopy",
    "Store",
    "bring_back",
    "is_url",
    "kept_in_store",
    "local_model",
    "open_store",
    "url_fault",
]
