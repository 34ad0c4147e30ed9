"""Argument checks the layers and models share."""


def check_switch(name: str, value: bool) -> None:
    """Raise a ValueError that names argument and value unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f'{name} must be True or False, got {value!r}')


def check_whole_number(name: str, value: int, least: int = 1) -> None:
    """Raise a ValueError that names argument and value unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f'{name} must be a whole number of at least {least}, got {value!r}')
