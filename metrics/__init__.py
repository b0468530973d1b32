"""Quality of samples: features of images, distances and scores between sets of them (evaluate.py)."""
