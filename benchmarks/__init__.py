"""Measurements against public peers, side by side in one run; each module says its method."""
