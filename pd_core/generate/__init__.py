"""The command generate: candidates are drawn from a generator and accepted by their density."""
