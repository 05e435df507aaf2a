"""Proves a layout: trains it and one device side by side, and says where they part."""

from meshwright.verify.run import run

__all__ = ["run"]
