"""Puts fast layers into a Whisper model, and takes them out again.

Nothing but the given instance changes: its layers, the norms at both ends and itself get a ``forward`` of their own, as
in :mod:`ft_core.fast.swap`. A call that they are not made for (with a cache, a mask, or asked for attentions) is
transformers' own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import ft_kernels as kernels
from ft_core.data.collating import IGNORE
from ft_core.fast.again import Choice, compute_by_choice, without_checkpointing
from ft_core.fast.find import NotFast, unwrapped
from ft_core.fast.forwards import Replaced, has_other
from ft_core.fast.head import as_count, can_fuse
from ft_core.fast.linears import is_plain, read
from ft_core.fast.offload import HostMemory
from ft_speech.fast.layers import SpeechLayer, layer_norm

__all__ = ["WhisperPath", "enable", "path_of"]

HANDLE = "_ft_speech_path"
HEAD = 2**30
"""Bytes that the head may use at a time."""
SHARE = 0.7
"""Of the free memory, what counted activations may fill."""


class WhisperPath:
    """The fast layers of one model.

    Attributes:
        model: transformers' model with its head.
        on: whether the fast layers are used.
        layers: what computes each layer, the encoder's first.
        host: activations that wait in the host's memory.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.on = True
        self.layers: list[SpeechLayer] = []
        self.host = HostMemory()
        self._changed: list[nn.Module] = []
        self._want: Literal["auto"] | Choice = "auto"
        self._memory: int | None = None
        self._planned: tuple[int, int] | None = None

    def choose(
        self, what: Literal["auto", "keep", "recompute", "offload"] = "auto", *, memory: int | None = None
    ) -> None:
        """Choose what each layer keeps between forward and backward, instead of a trainer's gradient_checkpointing.

        Args:
            what: ``keep`` all that backward wants, ``recompute`` it from the layers' inputs, ``offload`` these inputs
                to the host's memory; ``auto`` keeps as many layers as fit, and recomputes the rest.
            memory: bytes that the GPU's allocated memory may reach, for ``auto``; None for what is free.

        Raises:
            ValueError: no such choice.
        """
        choices: dict[str, Any] = {
            "auto": "auto", "keep": "keep", "recompute": "recompute", "offload": "offload-input",
        }  # fmt: skip
        if what not in choices:
            raise ValueError(f"choose: {what!r} (allowed: {', '.join(choices)})")
        self._want, self._memory, self._planned = choices[what], memory, None
        if what != "auto":
            for layer in self.layers:
                layer.choice = choices[what]

    def plan(self, audio: Tensor, text: int) -> None:
        """Before a batch is computed for backward: what layers keep of it.

        Args:
            audio: the features ``[B, mels, frames]``. text: how many tokens the batch is to write, padding included.
        """
        self.host.begin()
        if self._want != "auto":
            return
        heard = audio.shape[0] * self.model.config.max_source_positions
        if self._planned is not None and heard <= self._planned[0] and text <= self._planned[1]:
            return
        self._planned = heard, text
        if audio.device.type != "cuda":
            return
        room = SHARE * self._free(audio.device)
        sizes = [_kept(layer, heard, text, self.model.config) for layer in self.layers]
        inputs = [heard if not layer.listens else text for layer in self.layers]
        least = sum(inputs) * self.model.config.d_model * self.model.dtype.itemsize
        left = room - least - max(sizes)
        # The last layers first: backward begins with them.
        for layer, size in reversed(list(zip(self.layers, sizes, strict=True))):
            left -= size
            layer.choice = "keep" if left >= 0 else "recompute"

    def _free(self, device: torch.device) -> float:
        free, _ = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        free += torch.cuda.memory_reserved(device) - used
        limit = (
            torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.get_device_properties(device).total_memory
        )
        most = min(limit, self._memory) if self._memory is not None else limit
        return max(min(float(free), most - used), 0.0)

    def undo(self) -> None:
        """Give every instance its own forward back."""
        self.on = False
        for layer in self.layers:
            layer.wide.undo(list(layer.module.parameters()))
        for module in self._changed:
            if isinstance(vars(module).get("forward"), _Forward):
                del module.forward
        self._changed.clear()
        vars(self.model).pop(HANDLE, None)

    def put(self, forward: _Forward) -> None:
        forward.module.forward = forward  # type: ignore[assignment]
        self._changed.append(forward.module)


def _kept(layer: SpeechLayer, heard: int, text: int, config: Any) -> int:
    """Bytes that a layer keeps for backward: its single operations' inputs, two states wide ones at each perceptron."""
    d = config.d_model
    if layer.listens:
        numbers = text * (12 * d + 2 * config.decoder_ffn_dim) + 2 * heard * d
    else:
        numbers = heard * (8 * d + 2 * config.encoder_ffn_dim)
    return int(numbers * 2)


def path_of(model: Any) -> WhisperPath | None:
    """The fast layers of a model, or of what wraps it; None where there are none."""
    found: WhisperPath | None = vars(unwrapped(model)).get(HANDLE)
    return found


def enable(model: Any) -> WhisperPath:
    """Let a Whisper model compute with the fast layers; one that does already is left as it is.

    Args:
        model: ``WhisperForConditionalGeneration``, with or without PEFT's wrapping.

    Raises:
        NotFast: it is none, or its configuration asks for what they do not compute.
    """
    model = unwrapped(model)
    if (known := path_of(model)) is not None:
        return known
    _check(model)
    path = WhisperPath(model)
    body = model.model
    for stack in (body.encoder, body.decoder):
        for layer in stack.layers:
            fast = SpeechLayer(layer)
            path.layers.append(fast)
            path.put(_LayerForward(path, layer, fast))
        path.put(_NormForward(path, stack.layer_norm))
    path.put(_ModelForward(path, model))
    vars(model)[HANDLE] = path
    return path


def _check(model: Any) -> None:
    config = model.config
    if type(model).__name__ != "WhisperForConditionalGeneration":
        raise NotFast(f"it is a {type(model).__name__}, not WhisperForConditionalGeneration")
    if config.activation_function != "gelu":
        raise NotFast(f"its activation is {config.activation_function}, not gelu")
    for name in ("dropout", "attention_dropout", "activation_dropout"):
        if getattr(config, name, 0.0):
            raise NotFast(f"it has {name} {getattr(config, name)}")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise NotFast("it lies on several devices")
    body = model.model
    for part in (model, body, body.encoder, body.decoder, *body.encoder.layers, *body.decoder.layers):
        if has_other(part):
            raise NotFast(f"something else has replaced the forward of its {type(part).__name__}")


class _Forward(Replaced):
    def __init__(self, path: WhisperPath, module: nn.Module) -> None:
        super().__init__(module)
        self.path = path


class _NormForward(_Forward):
    def __call__(self, x: Tensor) -> Any:
        return layer_norm(self.module, x) if self.path.on else self.own(x)  # type: ignore[arg-type]


class _LayerForward(_Forward):
    def __init__(self, path: WhisperPath, module: nn.Module, fast: SpeechLayer) -> None:
        super().__init__(path, module)
        self.fast = fast

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **keywords: Any,
    ) -> Any:
        special = attention_mask is not None or encoder_attention_mask is not None or past_key_values is not None
        missing = self.fast.listens and encoder_hidden_states is None
        if not self.path.on or special or missing or keywords.get("output_attentions") or not self._plain():
            if self.fast.listens:
                keywords |= {
                    "encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask,
                    "past_key_values": past_key_values, "use_cache": use_cache,
                }  # fmt: skip
            return self.own(hidden_states, attention_mask, **keywords)
        compute = functools.partial(self.fast, heard=encoder_hidden_states)
        if self.fast.choice == "keep" or not torch.is_grad_enabled():
            return compute(hidden_states)
        return compute_by_choice(
            self.fast.choice,
            compute,
            hidden_states,
            False,
            lambda: self._trained(encoder_hidden_states),
            self.path.host,
        )

    def _plain(self) -> bool:
        return all(is_plain(child) for child in self.module.children())

    def _trained(self, heard: Tensor | None) -> list[Tensor]:
        """What is differentiated beside the input: the layer's parameters, and what it hears."""
        found: list[Tensor] = [p for p in self.module.parameters() if p.requires_grad]
        return [*found, heard] if heard is not None and heard.requires_grad else found


class _ModelForward(_Forward):
    """The whole model's: the loss without logits, where it is trained."""

    def __call__(
        self, input_features: Tensor | None = None, *args: Any, labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, num_items_in_batch: Any = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        path, model = self.path, self.module
        head: Any = model.proj_out
        told = {name: value for name, value in keywords.items() if value is not None}
        simple = not args and not (told.keys() - {"return_dict", "use_cache", "attention_mask"})
        fused = path.on and simple and model.training and labels is not None and input_features is not None
        if (
            not fused
            or labels is None
            or input_features is None
            or told.get("return_dict") is False
            or not can_fuse(head)
        ):
            if num_items_in_batch is not None:
                keywords["num_items_in_batch"] = num_items_in_batch
            return self.own(input_features, *args, labels=labels, decoder_input_ids=decoder_input_ids, **keywords)
        from transformers.modeling_outputs import Seq2SeqLMOutput
        from transformers.models.whisper.modeling_whisper import shift_tokens_right

        config: Any = model.config
        if labels.shape[1] > config.max_target_positions:
            return self.own(input_features, labels=labels, decoder_input_ids=decoder_input_ids, **keywords)
        if decoder_input_ids is None:
            decoder_input_ids = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        with self._planned(input_features, decoder_input_ids.numel()):
            body: Any = model.model
            hidden = body(
                input_features, decoder_input_ids=decoder_input_ids, attention_mask=told.get("attention_mask"),
                use_cache=False,
            ).last_hidden_state  # fmt: skip
        linear = read(head)
        assert linear is not None
        adapter = linear.adapter
        loss: Tensor = kernels.linear_cross_entropy(
            hidden, linear.weight, labels.to(hidden.device),
            bias=linear.bias, lora=None if adapter is None else (adapter.a, adapter.b, adapter.scaling),
            ignore_index=IGNORE, reduction="mean" if num_items_in_batch is None else "sum", max_memory=HEAD,
        )  # fmt: skip
        if num_items_in_batch is not None:
            loss = loss / as_count(num_items_in_batch, loss.device)
        return Seq2SeqLMOutput(loss=loss)

    @contextlib.contextmanager
    def _planned(self, features: Tensor, text: int) -> Iterator[None]:
        if not torch.is_grad_enabled():
            yield
            return
        self.path.plan(features, text)
        body: Any = self.module.model
        layers: Sequence[Any] = [*body.encoder.layers, *body.decoder.layers]
        with without_checkpointing([layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]):
            try:
                yield
            finally:
                self.path.host.settle()
