"""CSM (Sesame's conversational speech model): a Llama over text and frames of Mimi's codes, and a depth decoder."""

from __future__ import annotations

__all__: list[str] = []
