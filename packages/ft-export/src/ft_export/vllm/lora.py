"""An adapter for vLLM's LoRA serving: its files as they are, beside the name of its base.

What vLLM can serve was read from its source (version 0.32, ``vllm/lora/peft_helper.py`` and ``vllm/config/lora.py``);
anything else is refused here, where the message can say what to do instead.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ft_export.bases import copy_tokenizer, find_base, load_model, load_tokenizer, quantization_of
from ft_export.checkpoints import Checkpoint
from ft_export.errors import ExportError
from ft_export.exporting import PROOF, file_name
from ft_export.folders import new_folder, require_space, sha256_of
from ft_export.hearing import speech_family
from ft_export.merging.adapter import Adapter, LowRank, base_of
from ft_export.merging.names import parameter_names
from ft_export.progress import Progress, silent
from ft_export.runs import Source
from ft_export.seeing import sees
from ft_export.serving.engine import engine_of
from ft_export.serving.export import check_stops, prove, write_proof
from ft_export.serving.launch import Service, mounts_of, project_name, write_launch
from ft_export.serving.limits import limits_of, memory_of

__all__ = ["RANKS", "check_servable", "export_lora"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be."""
ADAPTER, TOKENIZER = "adapter", "tokenizer"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def check_servable(source: Source, adapter: Adapter) -> int:
    """The adapter's largest rank, if vLLM can serve it.

    Raises:
        ExportError: vLLM cannot; says why, and that the merged model can be served.
    """
    config = adapter.config
    reason = None
    if config.get("use_dora"):
        reason = "is a DoRA adapter"
    elif config.get("modules_to_save"):
        reason = f"holds whole modules ({', '.join(map(str, config['modules_to_save']))})"
    elif config.get("lora_bias") or config.get("bias", "none") != "none":
        reason = "has trained biases"
    elif source.on_quantized or adapter.changed_base is not None:
        reason = f"belongs to a base with other weights (init_lora_weights: {config.get('init_lora_weights')})"
    elif source.rope is not None:
        reason = "was trained with a rotary scaling that its base does not have"
    elif config.get("task_type") not in (None, "CAUSAL_LM"):
        reason = f"is for {config['task_type']}"
    else:
        for name, change in adapter.changes.items():
            if not isinstance(change, LowRank):
                reason = f"holds {name} whole"
            elif "lora_embedding" in change.parts["A"] or name.split(".")[-2] in ("lm_head", "embed_tokens"):
                reason = f"adapts {change.module}, an embedding or head"
            elif set(change.parts) != {"A", "B"}:
                reason = f"has more than A and B for {change.module}"
            if reason:
                break
    if reason:
        raise ExportError(f"{adapter.folder} {reason}, which vLLM cannot serve as LoRA: use --type 16bit")
    rank = max(
        adapter.files.shape(change.parts["A"])[0] for change in adapter.changes.values() if isinstance(change, LowRank)
    )
    if rank > RANKS[-1]:
        raise ExportError(f"{adapter.folder} has rank {rank}, vLLM serves up to {RANKS[-1]}: use --type 16bit")
    return rank


def export_lora(
    source: Source,
    folder: Path,
    said: dict[str, str],
    service: Callable[..., Service],
    progress: Progress = silent,
) -> tuple[Path, list[str]]:
    """Write the adapter, its tokenizer and stop tokens, launch files and proof into ``folder``.

    Args:
        service: :func:`ft_export.vllm.export.service`.

    Returns:
        The proof's path, and what was checked and found, for people.

    Raises:
        ExportError: bad input, or an adapter that vLLM cannot serve; nothing is left behind.
    """
    import torch
    import transformers

    if source.adapter is None:
        raise ExportError(f"{source.path} has no adapter (it was trained in full): use --type 16bit")
    memory = memory_of(said.get("memory"))
    engine = engine_of(said, "vllm")
    adapter = Adapter(source.adapter)
    rank = check_servable(source, adapter)
    limit = next(allowed for allowed in RANKS if allowed >= rank)
    reference = base_of(source, adapter)
    if not reference:
        raise ExportError(f"{adapter.folder / FILES[0]} names no base model: use --type 16bit")
    base = find_base(reference)
    method = quantization_of(base)
    if method is not None:
        raise ExportError(f"the base {base} is quantized ({method}): use --type 16bit, which merges into 16 bits")
    stored = Checkpoint(base)
    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    if speech_family(config) is not None:
        raise ExportError(f"the base {base} is a model of speech, whose adapters are not served here: use --type 16bit")
    if sees(config):
        raise ExportError(f"the base {base} is a model that sees, whose adapters are not served here: use --type 16bit")
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    adapter.check_shapes({name: tuple(p.shape) for name, p in empty.named_parameters(remove_duplicate=False)})
    changed = {name for name, known in parameter_names(stored, empty).items() if known in adapter.changes}
    _check_finite(adapter)
    lines = [
        f"the adapter changes {len(changed)} weights of {reference}, all of the right shape; largest rank {rank}",
    ]
    if source.quantization in ("nf4", "int8"):
        lines.append(f"the run held its base in {source.quantization}; vLLM serves the adapter on the 16-bit base")
    wide = stored.widest_float()
    dtype = "bfloat16" if wide == torch.float32 else str(wide).removeprefix("torch.")
    size = (adapter.folder / FILES[1]).stat().st_size
    weights = stored.parameters() * 2 + size
    limits = limits_of(base, weights, memory, said.get("context"))
    require_space(folder.parent, size + 50_000_000, "the adapter to serve")
    name = file_name(source)
    with new_folder(folder) as partial:
        (partial / ADAPTER).mkdir()
        for file in FILES:
            shutil.copyfile(adapter.folder / file, partial / ADAPTER / file)
            if sha256_of(partial / ADAPTER / file) != sha256_of(adapter.folder / file):
                raise ExportError(f"{file} is not the adapter's after it was copied: nothing was written")
        (partial / TOKENIZER).mkdir()
        brings = copy_tokenizer(adapter.folder, base, partial / TOKENIZER) == adapter.folder
        tokenizer = load_tokenizer(partial / TOKENIZER)
        rows = empty.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise ExportError(f"the adapter's tokenizer has {len(tokenizer)} tokens, its base {rows}: use --type 16bit")
        for file in ("generation_config.json", "config.json"):
            if (base / file).is_file():
                shutil.copyfile(base / file, partial / file)
        stops = check_stops(tokenizer, partial, lines)
        (partial / "config.json").unlink()  # was there to be asked for its stop tokens
        project = project_name(source.name, "vllm", source.path)
        write_launch(partial, _service(service, base, reference, name, dtype, limits.context, limit), limits, project)
        lines.append(f"tokenizer and chat template are the {'adapter' if brings else 'base'}'s byte for byte")
        lines.append(f"{limits.context} tokens of context: {' '.join(limits.told())}")

        def served_model() -> Any:
            from peft import PeftModel

            return PeftModel.from_pretrained(load_model(base, torch.float32), partial / ADAPTER).eval()

        served = prove(
            engine, "vllm", partial, partial / TOKENIZER, name, source, stops, limits.context, getattr(torch, dtype),
            served_model, lines, progress,
        )  # fmt: skip
        report: dict[str, Any] = {
            "type": "lora",
            "dtype": dtype,
            "base": reference,
            "rank": rank,
            "stop_tokens": stops,
            "context": limits.context,
            "served": served,
        }
        write_proof(partial, "vllm", report, lines)
    return folder / PROOF, lines


def _check_finite(adapter: Adapter) -> None:
    for key in adapter.files:
        if not adapter.files.tensor(key).isfinite().all():
            raise ExportError(f"{adapter.path}: {key} holds values that are no numbers: the adapter is broken")


def _service(
    service: Callable[..., Service], base: Path, reference: str, name: str, dtype: str, context: int, limit: int
) -> Service:
    local = Path(reference).expanduser().is_dir()
    mounts = {"/export": "."}
    if local:
        mounts |= mounts_of(base, "/base")
    more = [
        ("--tokenizer", TOKENIZER, f"/export/{TOKENIZER}"),
        ("--generation-config", ".", "/export"),
        ("--enable-lora", None, None),
        ("--max-lora-rank", str(limit), str(limit)),
        ("--lora-modules", f"{name}={ADAPTER}", f"{name}=/export/{ADAPTER}"),
    ]
    here, there = (str(base.absolute()), "/base") if local else (reference, reference)
    return service(here, there, f"{name}-base", dtype, context, more, mounts)
