"""Compares the service with public tools in the same run; each module explains its method."""
