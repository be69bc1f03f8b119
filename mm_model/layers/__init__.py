"""Keras layers of the fusion model, one topic per file.

numeric_encoding    raw numbers → scaled values and piecewise-linear components
category_embedding  category codes → learned features
augmentation        random augmentation of training images; resampling applies geometric changes
image_stack         several images per row ↔ a batch of single images; feature views
attention           tokens of columns, masks and query of the fusion `cross_attention`
blocks              dense blocks; dropout and batch_norm are the layers inside them
affine_logit        blends the heads and calibrates the result
"""
