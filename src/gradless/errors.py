"""What a user did that cannot work, said in one sentence."""


class GradlessError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do. The command line prints it alone."""
