"""What a worker does, without a socket: events in, instructions out, tensors on their own thread.

:mod:`~wsfed.worker.datasets` are the owner's; :mod:`~wsfed.worker.policy` says what may leave;
:mod:`~wsfed.worker.store` keeps the objects of one session; :mod:`~wsfed.worker.interpreter` runs
its commands; :mod:`~wsfed.worker.executor` is the thread they run on; and
:mod:`~wsfed.worker.session` decides what happens when.
"""
