"""Computes how certain metrics, differences and probabilities are.

draw_metrics       computes the metrics of many bootstrap draws at once
bootstrap          computes intervals from draws
model_comparison   compares models on the same rows
calibration_check  compares probabilities with labels
"""
