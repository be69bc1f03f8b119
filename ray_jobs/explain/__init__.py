"""Explains what a trained model looks at.

Input: a trained run and rows of prepared data. Output: plain numbers, and maps of images.

    explanation   the result
    explain_run   loads the model and runs everything below, in one process
    importance    permutes columns, and changes one column of all rows
    map_overlay   draws maps over images
    row_maps      maps of the images, contributions of columns
"""
