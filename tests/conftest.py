"""What all tests share."""

from __future__ import annotations

import hypothesis

from meshwright import env  # noqa: F401  # before gRPC, which it keeps quiet, and which some tests import themselves

# A deadline for an example would be an assertion on absolute time.
hypothesis.settings.register_profile("meshwright", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("meshwright")
