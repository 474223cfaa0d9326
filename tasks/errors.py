"""Errors a user can act on. Each message says where, what was wanted, what came, and the next step."""


class PrefixQuantError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(PrefixQuantError):
    """A setting is unknown, out of range, or contradicts another one."""


class UnsupportedModelError(PrefixQuantError):
    """The model's architecture, tokenizer or sizes cannot be handled."""


class CheckpointError(PrefixQuantError):
    """A checkpoint on disk is missing, truncated or does not hold what its config promises."""


class DataError(PrefixQuantError):
    """A text is missing, empty or too short."""


class NumericalError(PrefixQuantError):
    """A NaN or infinity appeared; the message says in which block and site."""
