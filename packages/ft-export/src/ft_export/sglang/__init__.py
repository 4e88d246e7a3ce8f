"""Folders that SGLang serves (``export``)."""
