"""The exception tree; each class carries the exit code of the command that raised it.

    MedsynthError            1   anything of ours that stops a command
    |- ConfigError           2   a configuration that cannot be read or contradicts itself
    |- InputError            3   a cohort (or a release) that cannot be used at all
    |- StoreError            4   a stage folder: unwritable, unfinished, or made from something else
    |- PrivacyError          5   a privacy rule would be broken
    |  |- BudgetError        6   the reservation does not fit into the budget
    |- CertificationError    7   something in the ancestry cannot be certified
    |- VerificationError     8   a release that does not hold what its certificate says
    |- UnexpectedError       9   something that nobody foresaw; its traceback stays in the run folder

Messages say what was given, what was expected and what to do; they hold no patient identifier and no path below
the cohort, because they end up in logs.
"""

from __future__ import annotations


class MedsynthError(Exception):
    """Base of every error that medsynth raises on purpose."""

    exit_code = 1


class ConfigError(MedsynthError):
    """The configuration is unreadable, has unknown keys or contradicts itself."""

    exit_code = 2


class InputError(MedsynthError):
    """The input as a whole cannot be used (single bad cases are quarantined instead)."""

    exit_code = 3


class StoreError(MedsynthError):
    """A stage folder is unwritable, unfinished, or was made from other inputs or settings."""

    exit_code = 4


class PrivacyError(MedsynthError):
    """Going on would break a privacy rule (failed preflight, forbidden module, tainted ledger)."""

    exit_code = 5


class BudgetError(PrivacyError):
    """The reservation asked for does not fit into the budget that is left."""

    exit_code = 6


class CertificationError(MedsynthError):
    """Something in the ancestry of a release cannot be certified."""

    exit_code = 7


class VerificationError(MedsynthError):
    """A release does not hold what its certificate says."""

    exit_code = 8


class UnexpectedError(MedsynthError):
    """Something that nobody foresaw; the message names no value, the traceback stays inside."""

    exit_code = 9
