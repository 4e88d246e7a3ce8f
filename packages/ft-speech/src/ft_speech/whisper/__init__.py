"""Whisper: trained to hear new words, and read from the format of CTranslate2."""

from __future__ import annotations

__all__: list[str] = []
