"""The client's half: a session on a worker, the handle of a worker, and what it gives out."""
