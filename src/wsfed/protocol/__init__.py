"""The wire, sans-I/O and torch-free: bytes and time in, messages and bytes out.

Reading order: :mod:`~wsfed.protocol.limits` (what is bounded and why),
:mod:`~wsfed.protocol.messages` (what can be said), :mod:`~wsfed.protocol.codec` (how it looks),
:mod:`~wsfed.protocol.chunks` (large tensors), :mod:`~wsfed.protocol.stream` (ordered and exactly
once), :mod:`~wsfed.protocol.session` (from the first hello to the last goodbye).
"""
