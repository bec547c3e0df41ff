"""Image generators behind one protocol (seeds to images; latents to images): noise, an adapter for each format, and how one is opened."""
