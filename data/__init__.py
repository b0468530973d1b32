"""What training sees: datasets, latents, their autoencoder, and the order of samples."""
