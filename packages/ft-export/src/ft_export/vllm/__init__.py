"""Folders that vLLM serves: a whole model, or an adapter beside its base (``export``)."""
