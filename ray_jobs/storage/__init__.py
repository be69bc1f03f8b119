"""Handles paths, URIs and atomic writes."""

from ray_jobs.storage.folder import Folder

__all__ = ["Folder"]
