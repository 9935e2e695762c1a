"""A model call, once for all three wings: the checks of what it takes, and the classes of what it gives."""
