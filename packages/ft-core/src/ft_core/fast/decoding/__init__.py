"""Answers written by the fast layers: keys and values kept in place, a step of all layers as one recorded graph."""

from ft_core.fast.decoding.decoder import Decoder, decoder_of, forget, rest

__all__ = ["Decoder", "decoder_of", "forget", "rest"]
