"""The command perturb: latents are moved so that their images become more common or more unique."""
