"""Audio codecs: samples to codes, and codes to samples. Each is a plugin of the group ``ft.codecs``."""

from ft_speech.codecs.protocol import Codec, Layout, StreamDecoder

__all__ = ["Codec", "Layout", "StreamDecoder"]
