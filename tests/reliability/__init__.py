"""What `tests/check_reliability.py` tries, a module for each kind of misfortune: a right result or one plain line."""
