"""Paths and URIs of any file system."""
