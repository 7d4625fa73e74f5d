"""The operations a worker runs: a frozen table of names, and how their arguments travel."""
