"""Verifies a layout: trains it and one device side by side, and reports where they first differ."""

from meshwright.verify.run import run

__all__ = ["run"]
