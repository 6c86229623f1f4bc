"""Rows, splits and replayable augmentation: from a source to batches."""
