"""The public names: a change here is a change of the interface."""

from __future__ import annotations

import importlib
import subprocess
import sys

API = {
    "ft_export": ["ExportError", "__version__", "export_gguf", "merge"],
    "ft_export.errors": ["ExportError", "one_line"],
    "ft_export.gguf": ["Converted", "convert"],
    "ft_export.exporting": ["Exported", "PROOF", "check_options", "file_name", "whole_model"],
    "ft_export.gguf.adapter": [
        "ADAPTER_TYPES",
        "LoraFile",
        "check_lora",
        "read_lora",
        "serve",
        "write_and_check",
        "write_lora",
    ],
    "ft_export.gguf.checking": ["check_in_llama_cpp", "write_proof"],
    "ft_export.gguf.export": ["export"],
    "ft_export.merging": ["MergeResult", "is_current", "merge"],
    "ft_export.runs": ["RUN_FORMAT", "Rope", "Source", "open_source", "read_json"],
}


def test_names() -> None:
    found = {name: sorted(importlib.import_module(name).__all__) for name in API}
    assert found == API
    for name, members in API.items():
        for member in members:
            assert getattr(importlib.import_module(name), member) is not None


def test_importing_is_light_and_needs_no_ft_core() -> None:
    code = (
        "import sys, ft_export, ft_export.commands.merge, ft_export.gguf, ft_export.merging, ft_export.gguf.export\n"
        "heavy = ('torch', 'transformers', 'peft', 'gguf', 'xllamacpp', 'ft_core')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
