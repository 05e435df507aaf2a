"""The constants behind every prediction, with their sources; profiles of them, and what measured runs correct."""

from meshwright.plan.constants.profile import DATASHEET, Profile, default_profile, load_profile

__all__ = ["DATASHEET", "Profile", "default_profile", "load_profile"]
