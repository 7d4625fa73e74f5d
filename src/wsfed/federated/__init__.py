"""Training over many workers."""
