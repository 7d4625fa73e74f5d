"""Pointers: tensors that look local and are on a worker."""
