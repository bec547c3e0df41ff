"""Pseudo density: formula, weightings by it, its predictor, the opened real set, and the scorer of images."""
