"""Audio codecs: samples to codes, and codes to samples. Each is a plugin of the group ``ft.codecs``.

>>> from ft_speech.codecs import load_codec
>>> codec = load_codec("snac", "hubertsiuzdak/snac_24khz")  # doctest: +SKIP
"""

from ft_speech.codecs.errors import CodecError
from ft_speech.codecs.loading import codec_class, find_codec, load_codec
from ft_speech.codecs.protocol import Codec, Layout, StreamDecoder

__all__ = ["Codec", "CodecError", "Layout", "StreamDecoder", "codec_class", "find_codec", "load_codec"]
