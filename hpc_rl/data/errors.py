"""The error of the data room: a user's file or column is not what the recipe says."""

from __future__ import annotations


class DataError(ValueError):
    """Rows cannot be read as the recipe's `data` section says; the message names file, row and column."""
