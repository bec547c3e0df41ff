"""Settings of each command: one place for every name, default, bound and unit."""
