RAYS_OWN: set[str] = set()
