"""Training data: datasets, latents, their autoencoder, and the order of samples."""
