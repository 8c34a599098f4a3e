"""Errors that a user can fix. Each message is one line."""


class UserError(Exception):
    """The base class of errors that a command prints as one line."""


class ConfigError(UserError, ValueError):
    """A flag, or a run folder, that a command cannot start with."""
