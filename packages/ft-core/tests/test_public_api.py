"""What others may import. A change here is a change of the interface, for the changelog."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import ft_core

EXPECTED: dict[str, list[str]] = {
    "ft_core": ["FtError", "TrainConfig", "__version__", "add_lora", "evaluate", "generate", "load", "train"],
    "ft_core.adapters": ["add_lora", "dense_targets"],
    "ft_core.cli": ["main"],
    "ft_core.commands": [],
    "ft_core.commands.arguments": ["count", "count_or_none", "share", "temperature"],
    "ft_core.commands.chat": ["add_arguments", "run"],
    "ft_core.commands.doctor": ["add_arguments", "run"],
    "ft_core.commands.eval": ["add_arguments", "run"],
    "ft_core.commands.export": ["add_arguments", "run"],
    "ft_core.commands.generate": ["add_arguments", "read_prompts", "run"],
    "ft_core.commands.plugins": ["add_arguments", "run"],
    "ft_core.commands.report": ["add_arguments", "run"],
    "ft_core.commands.train": ["add_arguments", "run"],
    "ft_core.config": [
        "DataSource",
        "LoraSettings",
        "TrainConfig",
        "TrainingSettings",
        "load_config",
        "parse_overrides",
        "to_yaml",
    ],
    "ft_core.config.load": ["check_config", "load_config", "method_settings", "parse_overrides", "to_yaml"],
    "ft_core.config.schema": ["DataSource", "LATER", "LoraSettings", "TrainConfig", "TrainingSettings"],
    "ft_core.console": ["progress", "quiet", "say"],
    "ft_core.memory": ["enough_memory", "is_memory_error"],
    "ft_core.data": [
        "Collator",
        "FORMATS",
        "Format",
        "Packed",
        "Rows",
        "Tokenized",
        "keeps_documents_apart",
        "pack",
        "read_rows",
        "recognise",
        "render_prompt",
        "split",
        "tokenize_rows",
    ],
    "ft_core.data.collating": ["Collator", "IGNORE", "keeps_documents_apart"],
    "ft_core.data.files": ["EXTENSIONS", "at", "nearest", "read_file"],
    "ft_core.data.formats": ["FORMATS", "Format", "ROLES", "recognise"],
    "ft_core.data.packing": ["Packed", "pack"],
    "ft_core.data.reading": ["read_rows"],
    "ft_core.data.rendering": [
        "ALPACA_PROMPT",
        "ALPACA_PROMPT_WITH_INPUT",
        "Draft",
        "Renderer",
        "alpaca_template",
        "render_prompt",
    ],
    "ft_core.data.rows": ["Rows", "split"],
    "ft_core.data.tokenizing": ["Tokenized", "tokenize_rows"],
    "ft_core.errors": ["ConfigError", "DataError", "FtError", "ModelError", "PluginError", "RunError"],
    "ft_core.evaluation": ["Evaluation", "EvaluationJob", "Sample", "compare", "evaluate", "evaluate_answers", "table"],
    "ft_core.generation": [
        "encode_prompt",
        "encode_prompts",
        "generate",
        "generate_ids",
        "render_chat",
        "stop_ids",
        "stream",
    ],
    "ft_core.models": [
        "Device",
        "ModelSource",
        "find_model",
        "load",
        "load_base",
        "load_for_training",
        "load_run",
        "load_tokenizer",
        "pick_device",
    ],
    "ft_core.models.device": ["Device", "peak_memory", "pick_device"],
    "ft_core.models.gguf": ["KNOWN_PACKAGES", "cache_folder", "from_file", "from_package"],
    "ft_core.models.loading": [
        "Quantization",
        "fitting_length",
        "load",
        "load_base",
        "load_for_training",
        "load_run",
        "load_tokenizer",
        "positions",
    ],
    "ft_core.models.opening": ["open_model"],
    "ft_core.models.source": ["ModelSource", "check_folder", "find_model"],
    "ft_core.plugin": ["CHAT", "DOCTOR", "EVAL", "EXPORT", "GENERATE", "PLUGINS", "REPORT", "SFT", "TEXT", "TRAIN"],
    "ft_core.plugins": [
        "API_VERSION",
        "ArchitectureSpec",
        "CodecSpec",
        "CommandSpec",
        "EXTRAS",
        "Entry",
        "ExportRequest",
        "ExportResult",
        "ExporterSpec",
        "GROUPS",
        "MethodSpec",
        "ModalitySpec",
        "Problem",
        "Registry",
        "RewardSpec",
        "RolloutSpec",
        "Spec",
        "registry",
        "resolve",
    ],
    "ft_core.plugins.registry": ["EXTRAS", "Entry", "Problem", "Registry", "registry"],
    "ft_core.plugins.specs": [
        "API_VERSION",
        "ArchitectureSpec",
        "CodecSpec",
        "CommandSpec",
        "ExportRequest",
        "ExportResult",
        "ExporterSpec",
        "GROUPS",
        "MethodSpec",
        "ModalitySpec",
        "RewardSpec",
        "RolloutSpec",
        "Spec",
        "resolve",
    ],
    "ft_core.quickstart": [],
    "ft_core.quickstart.dates": ["LOCALES", "SYSTEM", "make"],
    "ft_core.report": ["write_report"],
    "ft_core.report.figures": ["figures"],
    "ft_core.report.html": ["fold", "table", "text"],
    "ft_core.report.metrics": ["Metric", "label", "metrics_of"],
    "ft_core.report.numbers": [
        "DASH",
        "MINUS",
        "SPACE",
        "compact",
        "count",
        "date",
        "duration",
        "memory",
        "percent",
        "plain",
    ],
    "ft_core.report.page": ["build_page"],
    "ft_core.report.plots": ["Bar", "Series", "bar_plot", "line_plot"],
    "ft_core.report.read": ["RunRecord", "mapping", "number", "read_run"],
    "ft_core.report.sections": [
        "commands",
        "configuration",
        "data",
        "environment",
        "evaluation",
        "facts",
        "files",
        "samples",
    ],
    "ft_core.report.series": ["Axis", "downsample", "linear_axis", "log_axis", "smooth"],
    "ft_core.report.verdict": [
        "base_name",
        "circumstances",
        "generates",
        "losses",
        "method_name",
        "peak",
        "smoothing_span",
        "verdict",
    ],
    "ft_core.report.write": ["write_report"],
    "ft_core.runs": ["RUN_FORMAT", "Run", "write_json", "write_text"],
    "ft_core.training": ["Job", "TrainResult", "train"],
    "ft_core.training.arguments": ["total_steps", "trainer_arguments"],
    "ft_core.training.callbacks": ["Interruption", "MetricsWriter", "Progress"],
    "ft_core.training.job": ["Job"],
    "ft_core.training.lock": ["held"],
    "ft_core.training.memory": ["memory_errors_said"],
    "ft_core.training.prepare": [
        "check_resumable",
        "check_unfinished",
        "environment",
        "fingerprint",
        "prepare_model",
        "prepare_rows",
    ],
    "ft_core.training.ranks": ["Ranks"],
    "ft_core.training.run": ["TrainResult", "train"],
    "ft_core.training.sft": ["SftSettings", "build"],
    "ft_core.training.trainer": ["MANIFEST", "RunTrainerMixin", "last_whole_checkpoint", "storage_error"],
}


@pytest.mark.parametrize("module", EXPECTED)
def test_the_public_names(module: str) -> None:
    imported = importlib.import_module(module)
    assert sorted(imported.__all__) == EXPECTED[module]
    for name in imported.__all__:
        assert getattr(imported, name) is not None


def test_every_module_is_here() -> None:
    found = {module.name for module in pkgutil.walk_packages(ft_core.__path__, "ft_core.")}
    assert {"ft_core", *(name for name in found if not name.endswith("__main__"))} == set(EXPECTED)


def test_names_that_are_not_there() -> None:
    for module in ("ft_core", "ft_core.models", "ft_core.training"):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            importlib.import_module(module).nothing  # noqa: B018
    assert sorted(ft_core.__all__) == dir(ft_core)
