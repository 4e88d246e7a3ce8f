"""Sums of a tensor's rows by their numbers: rows that several documents share, copied for each and added up again."""

__all__: list[str] = []
