"""Fails on import, as a package does whose own dependencies are at odds."""

raise RuntimeError("no luck today\nand a second line")
