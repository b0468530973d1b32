"""Trained weights on disk: layouts, files, and those that are published."""
