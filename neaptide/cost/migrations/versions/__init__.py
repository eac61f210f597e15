"""One file a step, numbered; the newest is what schema.py describes."""
