"""The command build_index and its update: images to features, index, densities and predictor."""
