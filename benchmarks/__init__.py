"""Measures the service against public peers in the same run; each module explains its method."""
