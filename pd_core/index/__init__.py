"""Features of images and their nearest neighbors: backbones, the features stage, FAISS shards, search."""
