"""Recorded programs: what they are made of, how they are checked, and how they run."""
