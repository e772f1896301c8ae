"""Explanations: the record, its scores and flags, how many of them are shown and stored."""
