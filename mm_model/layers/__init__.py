"""Serialisable layers of the fusion model."""
