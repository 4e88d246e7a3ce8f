"""What other programs call a configuration's keys, so that their users are told ft's name rather than a similar one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ft_core.config.schema import LoraSettings, TrainConfig, TrainingSettings

__all__ = ["ALIASES", "meant_by"]

ALIASES: dict[str, str] = {
    alias: key
    for key, aliases in {
        "model": "model_name model_name_or_path base_model pretrained_model",
        "method": "stage rl trainer",
        "data": "dataset datasets dataset_name dataset_path train_data train_dataset train_file",
        "eval_data": "eval_dataset eval_file validation_file test_datasets",
        "eval_split": "val_set_size val_size validation_split test_size",
        "output": "output_dir save_dir",
        "quantization: nf4": "load_in_4bit",
        "quantization: int8": "load_in_8bit",
        "quantization": "bits quantization_bit quantization_config quant",
        "max_length": "max_seq_length max_seq_len seq_len seq_length sequence_len cutoff_len model_max_length",
        "packing": "sample_packing pack",
        "activations": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing",
        "lora": "adapter peft peft_config lora_config finetuning_type",
        "lora.r": "rank lora_r lora_rank",
        "lora.alpha": "lora_alpha",
        "lora.dropout": "lora_dropout",
        "lora.targets": "target_modules lora_target lora_target_modules lora_modules",
        "lora.rslora": "use_rslora rs_lora",
        "lora.dora": "use_dora peft_use_dora",
        "lora.bias": "lora_bias",
        "lora.modules_to_save": "lora_modules_to_save additional_target",
        "lora.init_lora_weights: loftq": "loftq loftq_config",
        "training.epochs": "num_train_epochs num_epochs n_epochs",
        "training.max_steps": "steps num_steps iters",
        "training.batch_size": "per_device_train_batch_size micro_batch_size per_device_batch_size train_batch_size",
        "training.gradient_accumulation": "gradient_accumulation_steps grad_accum_steps accumulation_steps",
        "training.learning_rate": "lr",
        "training.optimizer": "optim",
        "training.scheduler": "lr_scheduler_type lr_scheduler",
        "training.warmup_ratio": "warmup_steps warmup",
        "training.max_grad_norm": "gradient_clipping grad_clip",
        "training.save_every": "save_steps save_strategy saves_per_epoch",
        "training.keep_checkpoints": "save_total_limit",
        "training.eval_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch",
        "training.seed": "random_state data_seed random_seed",
        "rewards": "reward_funcs reward_functions reward_func",
        "sft.train_on": "train_on_inputs train_on_prompt assistant_only_loss completion_only_loss",
    }.items()
    for alias in aliases.split()
}
"""Keys of PEFT, TRL, transformers' trainer, Unsloth, Axolotl and LLaMA-Factory, and what ft calls them."""

PLACES = {
    **{key: f"training.{key}" for key in TrainingSettings.model_fields},
    **{key: f"lora.{key}" for key in LoraSettings.model_fields},
    **{key: key for key in TrainConfig.model_fields},
}
"""Where each of ft's own keys stands."""


def meant_by(key: str, where: str, allowed: Iterable[str]) -> str | None:
    """What an unknown key was meant to be, or None: another program's name, a key of another section, a misspelling.

    Args:
        where: the section that it was found in, with a dot at its end, or nothing.
        allowed: the section's keys.
    """
    plain = key.lower().replace("-", "_")
    known = ALIASES.get(plain) or PLACES.get(plain)
    if known is not None and known != where + key:
        return known
    close = difflib.get_close_matches(key, list(allowed), 1, cutoff=0.6)
    return where + close[0] if close else None
