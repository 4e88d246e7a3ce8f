"""The forwards of the model with its head, and of what merges images and text before the layers."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ft_core.data.collating import LENGTHS
from ft_core.fast.documents import BATCH, Batch, batch_of
from ft_core.fast.forwards import Forward, silent
from ft_core.fast.head import as_count, can_fuse, loss_of
from ft_core.fast.layout import at
from ft_core.fast.lent import head_lent
from ft_core.fast.recurring import documents_plan, filled_up, recurring_length, recurs
from ft_core.models.rotary import changes

if TYPE_CHECKING:
    from ft_core.fast.swap import FastPath

__all__ = ["BodyForward", "ModelForward", "takes"]

BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""transformers' keywords for the documents of a row."""


def takes(path: FastPath, past_key_values: Any, use_cache: bool | None) -> bool:
    """Whether the fast layers compute a call: they are on, and no key-value cache is read or, but in training, filled.

    In training none is filled unless one is given, whatever the model's configuration says.
    """
    if not path.on or past_key_values is not None:
        return False
    config = path.model.config
    config = config if hasattr(config, "use_cache") else config.get_text_config()
    return path.model.training or not (config.use_cache if use_cache is None else use_cache)


class BodyForward(Forward):
    """That of a model of images and text, which calls the layers' stack. What only the stack can use goes past it: a
    vision tower hands further keywords on to attention of its own."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        path, past = self.path, keywords.get("past_key_values")
        fast = not args and takes(path, past, keywords.get("use_cache"))
        names = (LENGTHS, BATCH, *(BOUNDS if fast else ()))
        told = {name: keywords.pop(name) for name in names if name in keywords}
        if fast and path.model.training:
            keywords["use_cache"] = False  # some make a cache themselves, which the layers would have to fill
        if path.layout.together is not None and not args and past is None:
            self._see(fast, told, keywords)
        before, path.told = path.told, told
        try:
            return self.own(*args, **keywords)
        finally:
            path.told = before

    def _see(self, fast: bool, told: dict[str, Any], keywords: dict[str, Any]) -> None:
        """Tell the stack the documents of a batch in which images' tokens may see each other, or hand on the masks that
        they are; neither where the batch is no documents, so that transformers makes its masks."""
        path = self.path
        types, mask = keywords.get(path.layout.together or ""), keywords.get("attention_mask")
        tokens = keywords.get("input_ids") if keywords.get("input_ids") is not None else keywords.get("inputs_embeds")
        if tokens is None or BATCH in told or keywords.get("output_attentions"):
            return
        shape = (tokens.shape[0], tokens.shape[1])
        batch = batch_of(shape, mask, keywords.get("position_ids"), told.get(LENGTHS), {**keywords, **told})
        if batch is not None and types is not None:
            batch = batch.seeing(shape, types == 1) if tuple(types.shape) == shape else None
        if batch is None:
            return
        config = path.model.config.get_text_config()
        if fast:
            told[BATCH] = batch
            keywords["attention_mask"] = dict.fromkeys(config.layer_types)  # given some, none are made
        elif mask is None and batch.images and config._attn_implementation in ("eager", "sdpa"):
            # Of a row of documents transformers (5.17 to 5.23 at least) looks images up, for layers with a window, by
            # a token's number in its document, as if that were its place in the row.
            windows = {"sliding_attention": config.sliding_window}
            pairs = {kind: batch.pairs(tokens[..., None], windows.get(kind)) for kind in set(config.layer_types)}
            if config._attn_implementation == "eager":
                dtype = path.model.dtype
                pairs = {k: (~v).to(dtype).mul_(torch.finfo(dtype).min) for k, v in pairs.items()}
            keywords["attention_mask"] = pairs


class ModelForward(Forward):
    """The whole model's: the loss without logits, where it is trained."""

    def __init__(self, path: FastPath, module: nn.Module, body: nn.Module) -> None:
        super().__init__(path, module)
        self.body = body

    def __call__(self, *args: Any, labels: Tensor | None = None, **keywords: Any) -> Any:
        layout = self.path.layout
        head = getattr(self.path.model, layout.head)
        some = keywords.get("logits_to_keep")  # a number, 0 for all; or positions
        asked = args or isinstance(some, Tensor) or some or keywords.get("return_dict") is False
        if not self.path.on or not self.path.model.training or labels is None or asked or not can_fuse(head):
            return self.own(*args, labels=labels, **keywords)
        from transformers.modeling_outputs import CausalLMOutputWithPast

        count, shifted = keywords.pop("num_items_in_batch", None), keywords.pop("shift_labels", None)
        for name in ("logits_to_keep", "return_dict"):
            keywords.pop(name, None)
        known = labels if shifted is None else shifted
        self.path.own_head = True
        try:
            loss = self._replayed(head, known, count, shifted is not None, **keywords)
            if loss is not None:
                return CausalLMOutputWithPast(loss=loss)
            timed = known.is_cuda and self.path.graphs.documents and keywords.get(LENGTHS) is not None
            if timed:
                self.path.pace.begin(known.device)
            outputs = self.body(**keywords)
        finally:
            self.path.own_head = False
        if timed:  # the head is a few launches of much work: at its end the GPU is behind, whoever set the pace
            self.path.pace.end(known.device, recurring_length(known.numel()))
        with head_lent(self.path):
            loss = loss_of(head, layout, outputs.last_hidden_state, known, count, shifted=shifted is not None,
                           max_memory=self.path.chooser.head)  # fmt: skip
        return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states)

    def _replayed(
        self,
        head: nn.Module,
        labels: Tensor,
        count: Any,
        shifted: bool,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        use_cache: Any = None,
        **others: Any,
    ) -> Tensor | None:
        """The loss by a recorded step; None where it has to be computed.

        Rows of tokens without padding are recorded as they are. A row of documents, whose lengths are stated, is filled
        up to a length that comes again, where the host is slower than the GPU.
        """
        path, lengths = self.path, others.pop(LENGTHS, None)
        if path.layout.body is not None:
            return None  # images come in all numbers and sizes
        if path.lent is not None:
            return None  # weights lie elsewhere at each step
        if input_ids is None or not input_ids.is_cuda or any(value is not None for value in others.values()):
            return None
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        wanted = path.graphs.on and (lengths is None or path.graphs.documents)
        if not wanted or several or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        tokens = input_ids.numel() if lengths is None else recurring_length(input_ids.numel())
        if not path.chooser.recordable(tokens, None if lengths is None else input_ids.device):
            path.graphs.drop()
            return None
        given = {"ids": input_ids, "labels": labels.to(input_ids.device)}
        if lengths is not None:
            if attention_mask is not None or not recurs(input_ids, position_ids, lengths, head, path.layout.head_dim):
                return None
            assert position_ids is not None
            given = filled_up(given["ids"], given["labels"], position_ids, lengths)
        else:
            batch = batch_of((input_ids.shape[0], input_ids.shape[1]), attention_mask, None, None, {})
            if batch is None or batch.plan is not None or position_ids is not None:
                return None

        def compute(
            ids: Tensor, labels: Tensor, positions: Tensor | None = None, documents: Tensor | None = None,
            count: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            keywords: dict[str, Any] = {}
            if documents is not None:
                keywords = {"position_ids": positions, BATCH: Batch(documents_plan(documents))}
            with contextlib.ExitStack() as stack:
                for decoder in path.decoders:
                    stack.enter_context(decoder.blocks.set_aside())
                hidden = self.body(input_ids=ids, use_cache=False, **keywords).last_hidden_state
                return loss_of(head, path.layout, hidden, labels, count, shifted=shifted, max_memory=path.chooser.head)

        if count is not None:
            given["count"] = as_count(count, input_ids.device)
        look = functools.partial(self._looks, shifted)
        if lengths is None:
            return path.graphs.loss(compute, given, look, path.model)
        return path.graphs.loss(compute, given, look, path.model, lambda: path.pace.by_host(tokens), fresh=True)

    def _looks(self, shifted: bool) -> tuple[Any, Any] | None:
        """What a recorded step depends on but for its input, and what that is made of; None where none can be."""
        path = self.path
        halves = [half for decoder in path.decoders for half in decoder.blocks.halves()]
        rotary = at(self.body, path.layout.rotary)
        if None in halves or not silent([self.body, getattr(path.model, path.layout.head)]) or changes(rotary):
            return None
        parameters = list(path.model.parameters())
        key = (
            shifted, path.tile, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
            tuple((decoder.blocks.keep, decoder.choice) for decoder in path.decoders), tuple(map(id, halves)),
            tuple((id(parameter), parameter.data_ptr(), parameter.requires_grad) for parameter in parameters),
        )  # fmt: skip
        return key, (halves, parameters)
