"""The contestants of `compare.py`. Each file is a program of its own, and runs in any environment
that has its library and numpy."""
