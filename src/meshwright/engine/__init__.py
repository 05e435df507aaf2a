"""Decoding: requests in, tokens out, many at once over a key-value cache.

Engine       open a model folder, submit requests, step, read events
Request      one completion to make
TokenEvent   one token of one request
TextStream   tokens to text: whole characters, stop strings
"""

from meshwright.engine.engine import Engine
from meshwright.engine.request import Request, TokenEvent
from meshwright.engine.text import TextStream

__all__ = ["Engine", "Request", "TextStream", "TokenEvent"]
