"""Whisper for CTranslate2's engine, which faster-whisper runs (``export``)."""

__all__: list[str] = []
