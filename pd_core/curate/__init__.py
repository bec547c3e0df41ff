"""The command curate: on a schedule, index what is new, generate, measure, and release what passes its gates."""
