"""Reads prepared shards into batches.

Input: a prepared folder.  Output: NumPy batches for each training or evaluation step.

    manifest      describes the prepared folder: columns, shards, splits, statistics
    batch         names, types and shapes of the arrays in a batch
    sampler       chooses the rows of each step
    chunks        divides a worker's rows into chunks, and plans what is read for each
    reader        reads row groups of the shards
    cache         keeps decoded row groups across epochs
    images        decodes user images and stored JPEGs
    dicom         reads DICOM files for `images`
    text_input    makes the reader that turns texts into token ids
    decoder       turns stored rows into the arrays of a batch
    prefetch      runs work ahead of its consumer in threads
    ray_reading   reads, and optionally decodes, a worker's chunks in Ray Data tasks
    loader        combines these into the feeds of one worker
"""
