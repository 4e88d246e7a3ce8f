from __future__ import annotations

import io
import subprocess
import sys

from PIL import Image

from ft_core.plugins.registry import registry
from ft_core.plugins.specs import ModalitySpec, resolve
from ft_vision.images import FORMATS


def test_the_modality_is_registered_and_reads(tmp_path: object) -> None:
    spec = registry().get(ModalitySpec, "vision")
    for reference in (spec.load, spec.settings, spec.processor, spec.rows, spec.adapter, spec.dataset, spec.collator):
        assert callable(resolve(str(reference)))
    assert callable(resolve(str(spec.evaluate)))
    assert spec.read is not None
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
    assert resolve(spec.read)(buffer.getvalue()).size == (3, 2)


def test_its_extensions_are_those_of_the_formats() -> None:
    Image.init()
    known = {ending: name.lower() for ending, name in Image.EXTENSION.items()}
    spec = registry().get(ModalitySpec, "vision")
    assert {known[ending] for ending in spec.extensions} == set(FORMATS)


def test_listing_imports_nothing_heavy() -> None:
    code = "import sys, ft_vision, ft_vision.plugin; print({'PIL', 'torch', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
