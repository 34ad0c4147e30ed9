"""Argument checks the layers share."""


def check_positive_int(name: str, value: int) -> None:
    """Raise a ValueError that names argument and value unless `value` is a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'{name} must be a whole number of at least 1, got {value!r}')
