"""The one error that users are meant to see."""


class RankwiseError(ValueError):
    """The user can put this right: the message says what is wrong, with which value, and what to do."""


class InMemoryOnlyError(RankwiseError):
    """Something that does not go block by block; the message says why."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is torch's word, on a GPU or a CPU, or Python's, for memory that is not there."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in str(error).lower() for t in texts))


def reason(error: BaseException) -> str:
    """What an exception says, on one line; its name where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."
