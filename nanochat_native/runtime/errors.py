"""Errors that a user can fix. Their message is one line."""


class UserError(Exception):
    """The base of errors that a command prints as one line."""


class ConfigError(UserError, ValueError):
    """A flag or a run folder that a command cannot start with."""
