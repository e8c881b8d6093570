"""What can go wrong, as one type: its text says what, where, why and what to do."""


class ClusterError(Exception):
    """The cluster could not be brought to the state asked for. The message is for the person at the keyboard."""
