"""The command tradeoff: precision against recall over thresholds of every method, drawn from one pool."""
