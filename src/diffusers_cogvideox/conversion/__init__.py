"""Checkpoints in and out: what a file or folder holds is told from its tensors, translated by the tables of `checkpoints`, and written."""
