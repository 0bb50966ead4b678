"""The one error that users are meant to see."""


class RankwiseError(ValueError):
    """Something the user can put right: the message says what was wrong, with which value, and what to do."""
