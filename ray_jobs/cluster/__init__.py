"""Connecting to Ray, capacity, and starting groups of TensorFlow workers."""
