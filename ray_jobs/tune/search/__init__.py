"""Chooses how trials train: their values, early stopping, and features in place of images.

space.py               validates the search space; values of a trial → its spec
searcher.py            suggests the values of the next trial
scheduler.py           stops, pauses or clones trials
scheduler_state.py     saves and restores a scheduler
feature_trials.py      decides whether trials train on features, and makes their specs
backbone_features.py   finds or computes prepared data with the features of a frozen backbone
feature_extractor.py   computes the features of a shard
"""
