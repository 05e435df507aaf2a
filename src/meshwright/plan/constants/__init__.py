"""The constants behind every prediction, with their sources; profiles of constants; corrections from measured runs."""

from meshwright.plan.constants.profile import DATASHEET, Profile, default_profile, load_profile

__all__ = ["DATASHEET", "Profile", "default_profile", "load_profile"]
