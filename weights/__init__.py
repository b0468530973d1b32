"""Trained weights on disk: layouts, files, and published weights."""
