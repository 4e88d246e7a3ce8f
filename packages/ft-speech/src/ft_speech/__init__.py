"""Speech for ft: audio files read and resampled without torchaudio."""

__all__ = ["__version__"]
__version__ = "0.1.0"
