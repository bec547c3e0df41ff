"""The commands evaluate and tradeoff: sets of images are measured against the real ones."""
