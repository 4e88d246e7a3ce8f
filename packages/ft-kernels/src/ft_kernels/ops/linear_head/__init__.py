"""Loss, log-probability and entropy from hidden states and a head, without the logits ever being whole."""

__all__: list[str] = []
