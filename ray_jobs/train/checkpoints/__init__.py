"""Saves and resumes a training run.

checkpoint            what a checkpoint contains, and its files
snapshot              copies it from the model and restores it
checkpoint_manager    writes it in the background and finds the newest one
"""
