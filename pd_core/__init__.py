"""Control fidelity and diversity of image generators, at scale, by pseudo density (arXiv 2407.08659)."""
