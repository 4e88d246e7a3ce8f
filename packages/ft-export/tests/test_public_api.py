"""The public names: a change here is a change of the interface."""

from __future__ import annotations

import importlib
import subprocess
import sys

API = {
    "ft_export": ["ExportError", "__version__", "export_gguf", "export_hub", "merge"],
    "ft_export.errors": ["ExportError", "one_line"],
    "ft_export.folders": [
        "KEY",
        "check_inside",
        "clear_inside",
        "clear_unfinished",
        "files_in",
        "key_of",
        "new_file",
        "new_folder",
        "refuse_existing_folder",
        "require_space",
        "scratch_folder",
        "sha256_of",
        "unfinished_bytes",
    ],
    "ft_export.gguf": ["Converted", "convert"],
    "ft_export.exporting": [
        "Exported",
        "PROOF",
        "check_options",
        "check_target",
        "file_name",
        "save_proof",
        "whole_model",
    ],
    "ft_export.gguf.architectures": ["ARCHITECTURES", "find_architecture", "is_known", "known"],
    "ft_export.gguf.adapter": [
        "ADAPTER_TYPES",
        "LoraFile",
        "check_lora",
        "read_lora",
        "serve",
        "write_and_check",
        "write_lora",
    ],
    "ft_export.gguf.checking": ["check_in_llama_cpp", "versions", "write_proof"],
    "ft_export.gguf.export": ["export", "new_folder_with_gguf"],
    "ft_export.gguf.foreign": ["check_rounded", "read_foreign", "rewrite"],
    "ft_export.gguf.growing": ["Growing"],
    "ft_export.gguf.upstream": ["OUT_TYPES", "SCRIPT", "convert_upstream", "find_script"],
    "ft_export.gguf.checking": ["check_in_llama_cpp", "write_proof"],
    "ft_export.gguf.export": ["OPTIONS", "export"],
    "ft_export.hub": ["TYPES", "Wanted"],
    "ft_export.hub.export": ["export"],
    "ft_export.hub.licence": [
        "IDENTIFIERS",
        "Licence",
        "check_licence",
        "find_licence",
        "licence_files",
        "read_front_matter",
        "said_licence",
    ],
    "ft_export.hub.wanted": ["HUB_NAME", "OPTIONS", "TYPES", "Wanted", "check_type", "read_options"],
    "ft_export.gguf.pieces": ["ADDED_SCORE", "Prefix", "SPACE", "UNUSED_SCORE", "prefix_of", "read_model", "scores_of"],
    "ft_export.gguf.rules": ["Architecture", "Operation", "Output", "Rule", "plan", "same"],
    "ft_export.ollama": [],
    "ft_export.ollama.deriving": ["Candidate", "Chat", "Refused", "candidates"],
    "ft_export.ollama.equality": [
        "CONTINUED",
        "CONVERSATIONS",
        "FURTHER",
        "Proven",
        "adds_bos",
        "chat_of",
        "prove",
        "prove_any",
    ],
    "ft_export.ollama.export": ["Filled", "MODELFILE", "OPTIONS", "export", "fill"],
    "ft_export.ollama.go_functions": ["FUNCTIONS", "truth"],
    "ft_export.ollama.go_tokens": ["GoTemplateError", "Piece", "Token", "pieces", "quoted", "unquoted"],
    "ft_export.ollama.go_template": ["FUNCTIONS", "GoTemplateError", "Template", "parse", "quoted"],
    "ft_export.ollama.modelfile": ["Command", "read_modelfile", "write_modelfile"],
    "ft_export.ollama.program": ["check_name", "create", "push", "require_ollama", "run_name"],
    "ft_export.ollama.rendering": ["Message", "collate", "render"],
    "ft_export.open_webui": [],
    "ft_export.open_webui.compose": ["ENGINES", "IMAGES", "Wiring", "check_compose", "compose"],
    "ft_export.open_webui.export": ["COMPOSE", "MODEL", "OPTIONS", "export"],
    "ft_export.open_webui.model_json": ["model_json", "unescaped"],
    "ft_export.conversations": ["SAMPLING", "Serving", "all_rows", "conversation", "serving", "whole_number"],
    "ft_export.merging": ["MergeResult", "is_current", "merge"],
    "ft_export.merging.adapter": ["Adapter", "LowRank", "PLAIN_STARTS", "Replacement", "base_of"],
    "ft_export.merging.arithmetic": [
        "Blocks",
        "DEVICES",
        "device_of",
        "exact_products",
        "merged_bias",
        "merged_weight",
    ],
    "ft_export.merging.combination": [
        "COMBINATIONS",
        "Combination",
        "DEFAULT",
        "Part",
        "SIGNS",
        "combination_of",
        "other_templates",
        "parts_of",
        "weighted",
    ],
    "ft_export.merging.combined_check": ["check_combined"],
    "ft_export.merging.combining": ["Combined", "combine", "combined_adapter", "put_together"],
    "ft_export.merging.dequantizing": ["write_dequantized"],
    "ft_export.merging.outline": ["Outline", "built"],
    "ft_export.merging.record": [
        "MARKER",
        "Standing",
        "UNPROVEN",
        "again",
        "base_files",
        "check_unchanged",
        "fingerprint",
        "is_current",
        "standing",
        "sums",
    ],
    "ft_export.serving": ["FORMS", "Form", "Whole", "write_whole"],
    "ft_export.serving.checks": ["Gap", "check_gap", "check_stored", "served_model"],
    "ft_export.serving.export": ["OPTIONS", "check_stops", "export_whole", "prove", "write_proof"],
    "ft_export.serving.folder": ["Plan", "Whole", "plan_whole", "write_whole"],
    "ft_export.serving.forms": ["COMPRESSED", "FORMS", "Form", "form_of"],
    "ft_export.serving.launch": ["MARKER", "Service", "write_launch"],
    "ft_export.serving.limits": ["ALLOWANCE", "CARDS", "Limits", "UTILIZATION", "limits_of", "memory_of"],
    "ft_export.serving.engine": ["Answer", "Engine", "OPTIONS", "Server", "engine_of", "running"],
    "ft_export.serving.launch": ["MARKER", "Service", "mounts_of", "project_name", "write_launch"],
    "ft_export.serving.served": ["NOT_RUN", "Question", "Served", "check_served", "questions"],
    "ft_export.serving.limits": ["ALLOWANCE", "Limits", "UTILIZATION", "limits_of", "memory_of"],
    "ft_export.serving.stream": ["Planned", "write_tensors"],
    "ft_export.sglang.export": ["IMAGE", "TYPES", "export"],
    "ft_export.vllm.export": ["IMAGE", "TYPES", "export", "service"],
    "ft_export.vllm.lora": ["RANKS", "check_servable", "export_lora"],
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
        "import ft_export.hub.export, ft_export.vllm.export, ft_export.sglang.export\n"
        "import ft_export.ollama.export, ft_export.open_webui.export\n"
        "heavy = ('torch', 'transformers', 'peft', 'gguf', 'xllamacpp', 'ft_core', 'huggingface_hub')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
