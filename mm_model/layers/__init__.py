"""Keras layers of the fusion model, one idea per file.

numeric_encoding    raw numbers → scaled values and piecewise-linear components
category_embedding  category codes → learned features
augmentation        random changes of training images; resampling applies the geometric ones
image_stack         several images per row ↔ a batch of single images; feature views
blocks              dense blocks; dropout and batch_norm are the layers inside them
affine_logit        blend of the heads, and calibration
"""
