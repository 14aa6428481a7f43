"""Entries of every stage, each a module that `python -m` and `deepspeed --module` can start."""
