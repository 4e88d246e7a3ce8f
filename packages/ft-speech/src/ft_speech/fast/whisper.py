"""Puts fast layers into a Whisper model, and takes them out again.

Nothing but the given instance changes: its layers, the norms at both ends and itself get a ``forward`` of their own, as
in :mod:`ft_core.fast.swap`. A call that they are not made for (with a cache, a mask, or asked for attentions) is
transformers' own.
"""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ft_kernels as kernels
from ft_core.data.collating import IGNORE
from ft_core.fast.again import without_checkpointing
from ft_core.fast.find import NotFast, unwrapped
from ft_core.fast.forwards import Replaced, has_other, silent
from ft_core.fast.graphs import Graphs
from ft_core.fast.head import as_count, can_fuse
from ft_core.fast.linears import is_plain, read, state
from ft_core.fast.offload import HostMemory
from ft_speech.fast.again import computed_again
from ft_speech.fast.choosing import Chosen, Wanted, chosen
from ft_speech.fast.layers import SpeechLayer, layer_norm

__all__ = ["WhisperPath", "enable", "path_of"]

HANDLE = "_ft_speech_path"
OFFLOADED = 2
"""Steps that are recorded where layers' inputs are offloaded: each keeps its buffers in the host's memory to itself."""
TEXT = 32
"""Tokens to write are filled up to a multiple of this, so that batches of few lengths come again and again: a recorded
step is of one length. What is added is not trained, and seen by nothing before it."""


class WhisperPath:
    """The fast layers of one model.

    Attributes:
        model: transformers' model with its head.
        on: whether the fast layers are used.
        layers: what computes each layer, the encoder's first.
        chosen: what they keep between forward and backward.
        graphs: recorded steps; ``graphs.on = False`` does without.
        host: activations that wait in the host's memory.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.on = True
        self.layers: list[SpeechLayer] = []
        self.chosen = Chosen()
        self.graphs = Graphs()
        self.host = HostMemory()
        self._want: Wanted = "auto"
        self._memory: int | None = None
        self._planned: tuple[int, int] | None = None
        self._changed: list[nn.Module] = []

    def choose(self, what: Wanted = "auto", *, memory: int | None = None) -> None:
        """Choose what each layer keeps between forward and backward, instead of a trainer's gradient_checkpointing.

        Args:
            what: ``keep`` all that backward wants, ``recompute`` it from the layers' inputs, ``offload`` these inputs
                to the host's memory; ``auto`` does the first that fits, layer by layer.
            memory: bytes that the GPU's allocated memory may reach, for ``auto``; None for what is free.

        Raises:
            ValueError: no such choice.
        """
        if what not in ("auto", "keep", "recompute", "offload"):
            raise ValueError(f"choose: {what!r} (allowed: auto, keep, recompute, offload)")
        self._want, self._memory, self._planned = what, memory, None

    def tighter(self) -> str | None:
        """Keep less, after a step that did not fit. What was done, in words; None if nothing is left."""
        if self._want == "offload":
            return None
        self.graphs.drop()  # recorded steps hold the memory that they were recorded with
        self.choose("offload")
        return "the layers' inputs wait in the host's memory, and the rest is computed again in backward"

    def plan(self, audio: Tensor, text: int) -> None:
        """Before a batch is computed for backward: what layers keep of it.

        Args:
            audio: the features ``[B, mels, frames]``. text: how many tokens are written of each, padding included.
        """
        self.host.begin()
        shape = audio.shape[0], text
        if self._planned is not None and all(new <= old for new, old in zip(shape, self._planned, strict=True)):
            return
        self._planned = shape
        self.chosen = chosen(self.layers, self.model, shape, audio.device, self._want, self._memory)

    def undo(self) -> None:
        """Give every instance its own forward back."""
        self.on = False
        self.graphs.drop()
        for layer in self.layers:
            layer.wide.undo(list(layer.module.parameters()))
        for module in self._changed:
            if isinstance(vars(module).get("forward"), _Forward):
                del module.forward
        self._changed.clear()
        vars(self.model).pop(HANDLE, None)

    def put(self, forward: _Forward) -> None:
        """Give an instance another forward."""
        forward.module.forward = forward  # type: ignore[assignment]
        self._changed.append(forward.module)


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
        return layer_norm(cast(nn.LayerNorm, self.module), x) if self.path.on else self.own(x)


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
        known = attention_mask is not None and attention_mask.numel() == 0  # what _ModelForward says: none but causal
        special = not (known or attention_mask is None) or encoder_attention_mask is not None
        special = special or past_key_values is not None
        missing = self.fast.listens and encoder_hidden_states is None
        plain = all(is_plain(child) for child in self.module.children())
        if not self.path.on or special or missing or keywords.get("output_attentions") or not plain:
            if known:
                attention_mask = _causal(hidden_states)
            if self.fast.listens:
                keywords |= {
                    "encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask,
                    "past_key_values": past_key_values, "use_cache": use_cache,
                }  # fmt: skip
            return self.own(hidden_states, attention_mask, **keywords)
        # The encoder's convolutions leave their channels first, and a sum keeps the order of its terms.
        hidden_states, heard = hidden_states.contiguous(), encoder_hidden_states
        choice = self.path.chosen.of(self.fast) if torch.is_grad_enabled() else "keep"
        if choice == "keep":
            return self.fast(hidden_states, heard)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        with self.path.host.layer() if choice == "offload" else contextlib.nullcontext():
            return computed_again(self.fast, hidden_states, heard, trained, self.path.chosen.pieces)


def _causal(x: Tensor) -> Tensor:
    """What is added to scores so that tokens ``[B, S, H]`` see nothing after them, ``[1, 1, S, S]``."""
    length = x.shape[1]
    return torch.full((1, 1, length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)


class _ModelForward(_Forward):
    """The whole model's: the loss without logits, where it is trained."""

    def __call__(
        self, input_features: Tensor | None = None, *args: Any, labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, num_items_in_batch: Any = None, **keywords: Any,
    ) -> Any:  # fmt: skip
        told = {name: value for name, value in keywords.items() if value is not None}
        if labels is None or input_features is None or args or not self._fuses(labels, told):
            if num_items_in_batch is not None:
                keywords["num_items_in_batch"] = num_items_in_batch
            return self.own(input_features, *args, labels=labels, decoder_input_ids=decoder_input_ids, **keywords)
        from transformers.modeling_outputs import Seq2SeqLMOutput
        from transformers.models.whisper.modeling_whisper import shift_tokens_right

        config: Any = self.module.config
        if decoder_input_ids is None:
            decoder_input_ids = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        device = input_features.device
        room = min(-(-labels.shape[1] // TEXT) * TEXT, config.max_target_positions) - labels.shape[1]
        given = {
            "features": input_features,
            "ids": F.pad(decoder_input_ids.to(device), (0, room), value=config.pad_token_id),
            "labels": F.pad(labels.to(device), (0, room), value=IGNORE),
        }
        if num_items_in_batch is not None:
            given["count"] = as_count(num_items_in_batch, device)
        if not torch.is_grad_enabled():
            return Seq2SeqLMOutput(loss=self._loss(**given, mask=told.get("attention_mask")))
        self.path.plan(input_features, given["ids"].shape[1])
        loss = self._recorded(given) if told.get("attention_mask") is None else None
        if loss is None:
            loss = self._loss(**given, mask=told.get("attention_mask"))
        return Seq2SeqLMOutput(loss=loss)

    def _fuses(self, labels: Tensor, told: dict[str, Any]) -> bool:
        """Whether a call is a training step that asks for no more than its loss."""
        model: Any = self.module
        simple = (
            not (told.keys() - {"return_dict", "use_cache", "attention_mask"}) and told.get("return_dict") is not False
        )
        fits = labels.shape[1] <= model.config.max_target_positions
        return self.path.on and model.training and simple and fits and can_fuse(model.proj_out)

    def _loss(
        self, features: Tensor, ids: Tensor, labels: Tensor, count: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        model: Any = self.module
        body = model.model
        flagged = [m for m in (*body.encoder.layers, *body.decoder.layers) if getattr(m, "gradient_checkpointing", 0)]
        with without_checkpointing(flagged):
            # A mask with four dimensions is handed on as it is. Without one transformers leaves it to the attention,
            # but not while a step is recorded.
            none = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=ids.device)
            hidden = body(
                features, decoder_input_ids=ids, decoder_attention_mask=none, attention_mask=mask, use_cache=False
            ).last_hidden_state
        self.path.host.settle()
        linear = read(model.proj_out)
        assert linear is not None
        adapter = linear.adapter
        loss: Tensor = kernels.linear_cross_entropy(
            hidden, linear.weight, labels, bias=linear.bias,
            lora=None if adapter is None else (adapter.a, adapter.b, adapter.scaling),
            ignore_index=IGNORE, reduction="mean" if count is None else "sum", max_memory=self.path.chosen.head,
        )  # fmt: skip
        return loss if count is None else loss / count

    def _recorded(self, given: dict[str, Tensor]) -> Tensor | None:
        """The loss by a recorded step; None where it has to be computed."""
        path = self.path
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not given["features"].is_cuda or several or torch.compiler.is_compiling() or not path.graphs.on:
            return None

        def worth() -> bool:
            return path.graphs.recorded < OFFLOADED or not path.chosen.offloads

        return path.graphs.loss(self._loss, given, self._looks, path.model, worth, fresh=True)

    def _looks(self) -> tuple[Any, Any] | None:
        """What a recorded step depends on but for its input, and what that is made of; None where none can be."""
        model: Any = self.module
        body, config = model.model, model.config
        drawn = config.apply_spec_augment and (config.mask_time_prob or config.mask_feature_prob)
        if drawn or body.encoder.layerdrop or body.decoder.layerdrop or not silent([body, model.proj_out]):
            return None
        linears = [m for m in model.modules() if hasattr(m, "base_layer") or isinstance(m, nn.Linear)]
        read_ones = [read(m) for m in linears if hasattr(m, "base_layer")]
        if any(one is None or (one.adapter is not None and one.adapter.dropout) for one in read_ones):
            return None
        parameters = list(model.parameters())
        key = (
            path_key(self.path), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
            tuple(state(m) for m in linears),
            tuple((id(p), p.data_ptr(), p.requires_grad) for p in parameters),
        )  # fmt: skip
        return key, (linears, parameters)


def path_key(path: WhisperPath) -> tuple[Any, ...]:
    """What of the choices a recorded step depends on."""
    return path.chosen.pieces, path.chosen.head, tuple(path.chosen.of(layer) for layer in path.layers)
