"""The plugin registry: what a plugin declares (`specs`) and how plugins are found (`registry`)."""

from ft_core.plugins.registry import EXTRAS, Entry, Problem, Registry, registry
from ft_core.plugins.specs import (
    API_VERSION,
    GROUPS,
    ArchitectureSpec,
    CodecSpec,
    CommandSpec,
    ExporterSpec,
    ExportRequest,
    ExportResult,
    MethodSpec,
    ModalitySpec,
    RewardSpec,
    RolloutSpec,
    Spec,
    resolve,
)

__all__ = [
    "API_VERSION",
    "EXTRAS",
    "GROUPS",
    "ArchitectureSpec",
    "CodecSpec",
    "CommandSpec",
    "Entry",
    "ExportRequest",
    "ExportResult",
    "ExporterSpec",
    "MethodSpec",
    "ModalitySpec",
    "Problem",
    "Registry",
    "RewardSpec",
    "RolloutSpec",
    "Spec",
    "registry",
    "resolve",
]
