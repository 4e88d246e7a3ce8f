"""Qwen3-ASR: a recogniser that is a language model behind an audio encoder, trained on ft_core's fast layers."""

from __future__ import annotations

__all__: list[str] = []
