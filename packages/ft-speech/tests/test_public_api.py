"""What others may import. A change here is a change of the interface, for the changelog."""

from __future__ import annotations

import importlib

EXPECTED = {
    "ft_speech": ["AudioError", "__version__", "read_audio", "resample", "write_audio"],
    "ft_speech.audio": ["AudioError", "FORMATS", "SAMPLING_RATES", "read_audio", "resample", "write_audio"],
    "ft_speech.containers": ["missing_bytes"],
    "ft_speech.plugin": ["STT"],
}


def test_the_public_names() -> None:
    found = {module: sorted(importlib.import_module(module).__all__) for module in EXPECTED}
    assert found == EXPECTED


def test_every_public_name_is_there() -> None:
    for module, names in EXPECTED.items():
        for name in names:
            assert getattr(importlib.import_module(module), name) is not None
