"""The one error type for a mistake of the user's or of the machine's."""


class UserError(Exception):
    """A mistake that one plain line explains: what is wrong and what to do."""
