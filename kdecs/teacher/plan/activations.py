"""Memory of a forward and a backward, traced on the teacher's own network with a few layers on the meta device.

On meta nothing is computed and only shapes exist, so tracing a 13B network takes a fraction of a second. Layers are
alike, so memory is linear in the number of layers, and two depths determine the line. Frozen weights, adapters and
gradients are not counted here but in `memory`.

Shapes: N packed tokens, P prompts (rows), T tokens of a padded row, A answer words.
"""

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.teacher.config import LoraConfig
from kdecs.teacher.families import language_model
from kdecs.teacher.metering import NUM_DECODER_TOKENS
from kdecs.teacher.network import family_of, meta_network
from kdecs.teacher.tree import attention as tree_attention
from kdecs.teacher.tree.attention import mask_arguments, use_tree_attention
from kdecs.teacher.tree.prefix_tree import PackedTree


class TensorMemory(TorchDispatchMode):
    """Counts the operators run inside a `with` block, and the live bytes of the storages that they make.

    `known` tensors are left out.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.num_operators = 0
        self._known = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in known}
        self._counted: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        self.num_operators += 1
        result = func(*args, **(kwargs or {}))
        # Most operators return one tensor: a tree walk for each of some 10,000 operators would cost as much as they do.
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def release(self, tensor: Tensor) -> None:
        """Stop counting a tensor that is counted elsewhere from now on (a gradient)."""
        storage = tensor.untyped_storage()
        if self._counted.pop(storage._cdata, None) is not None:
            self.live_bytes -= storage.nbytes()
            self._known[storage._cdata] = storage

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._counted or key in self._known:
            return
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._counted[key] = weakref.ref(storage, self._forget(key, storage.nbytes()))

    def _forget(self, key: int, num_bytes: int) -> Callable[[Any], None]:
        def forget(reference: Any) -> None:
            # Addresses are reused once a storage is gone, so drop only the entry of this very storage.
            if self._counted.get(key) is reference:
                del self._counted[key]
                self.live_bytes -= num_bytes

        return forget


TreeKind = Literal["flex", "blocks", "mask"]
"""The attention over a tree (see `kdecs.teacher.tree.attention`): by default flex on CUDA, blocks on CPU."""

# At least three, so that the second layer from below, at which the peak is split, is not the last one as well.
_DEPTHS = (3, 5)
META = torch.device("meta")


@dataclass(frozen=True)
class Shape:
    """A micro-batch: a packed tree (one row), or `rows` prompts padded to `tokens`; `answers` logits are read."""

    rows: int
    tokens: int
    answers: int
    tree: PackedTree | None = None


@dataclass(frozen=True)
class Activations:
    """Highest bytes until the backward reaches the second layer, and from there to its end, when all gradients exist.

    `launches` counts the operators of a forward and a backward.
    """

    peak_bytes: int
    backward_end_bytes: int
    launches: int


class ActivationTracer:
    """Traces micro-batches of one training. `config` is a Transformers config of any depth, `lora` None is full tuning.

    Networks are kept between traces, since building one costs as much as tracing it.
    """

    def __init__(
        self, config: Any, lora: LoraConfig | None, *, dtype: torch.dtype, attention: TreeKind
    ) -> None:
        self.config = config
        self.lora = lora
        self.dtype = dtype
        self.attention: TreeKind = attention
        self._networks: dict[int, Any] = {}

    def memory(self, shape: Shape, *, checkpointing: bool) -> Activations:
        """Highest bytes of activations and temporaries of a micro-batch's forward and backward."""
        shallow, deep = (self.memory_at_depth(shape, depth, checkpointing=checkpointing) for depth in _DEPTHS)
        layers = (self.config.num_hidden_layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
        # The end of the backward does not grow with depth, so it is no point on the line.
        return between(shallow, deep, layers, end=deep.backward_end_bytes)

    def memory_at_depth(self, shape: Shape, depth: int, *, checkpointing: bool) -> Activations:
        """The same for a network of `depth` layers (at least 3), without extrapolation."""
        network = self._network(depth, checkpointing)
        base = language_model(network)
        memory = TensorMemory([*network.parameters(), *network.buffers()])
        peaks: list[int] = []

        def accumulated(parameter: nn.Parameter, is_second_layer: bool) -> None:
            memory.release(parameter.grad)  # `memory.state_bytes` counts gradients, by ZeRO's rules
            # Until here the peak grows with depth. What follows is the same for any depth, so it is measured by itself.
            if is_second_layer and not peaks:
                peaks.append(memory.peak_bytes)
                memory.peak_bytes = memory.live_bytes

        hooks = [
            parameter.register_post_accumulate_grad_hook(
                partial(accumulated, is_second_layer=_is_second_layer(name, self.config))
            )
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        ]
        with _fused_attention(), memory:
            logits_PV = _answer_logits(base, shape, self.attention)
            answer_ids_A = torch.arange(len(CONNECTIVES), device=META)
            log_p_PA = torch.log_softmax(logits_PV[:, answer_ids_A].float(), dim=-1)
            # Any number that depends on all answers will do: what is traced are shapes.
            log_p_PA.logsumexp(dim=-1).sum().backward()
        for hook in hooks:
            hook.remove()
        network.zero_grad(set_to_none=True)
        return Activations(peaks[0], memory.peak_bytes, memory.num_operators)

    def _network(self, depth: int, checkpointing: bool) -> Any:
        if depth not in self._networks:
            network = meta_network(_of_depth(self.config, depth), self.lora, dtype=self.dtype)
            # DeepSpeed casts adapters, which PEFT makes in float32, to the dtype of the engine.
            for parameter in network.parameters():
                parameter.data = parameter.data.to(self.dtype)
            base = language_model(network)
            base.config.use_cache = False
            if family_of(self.config) == "causal":
                use_tree_attention(base)
            self._networks[depth] = network.train()
        base = language_model(self._networks[depth])
        if base.is_activation_checkpointing and not checkpointing:
            base.activation_checkpointing_disable()
            base.disable_input_require_grads()
        elif checkpointing and not base.is_activation_checkpointing:
            base.activation_checkpointing_enable()
            base.enable_input_require_grads()
        return self._networks[depth]


def between(a: Activations, b: Activations, position: float, *, end: int | None = None) -> Activations:
    """The point at `position` on the line through a (0) and b (1). `end` replaces a value that is not on the line."""
    values = {
        name: round(getattr(a, name) + (getattr(b, name) - getattr(a, name)) * position)
        for name in ("peak_bytes", "backward_end_bytes", "launches")
    }
    return Activations(**values if end is None else {**values, "backward_end_bytes": end})


def _of_depth(config: Any, depth: int) -> Any:
    """The config with this number of layers, in encoder and decoder each."""
    shallow = deepcopy(config)
    shallow.num_hidden_layers = depth
    if getattr(shallow, "is_encoder_decoder", False):
        shallow.num_decoder_layers = depth
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:depth]
    return shallow


def _is_second_layer(name: str, config: Any) -> bool:
    """Whether a parameter belongs to the second layer from below (of the encoder, if there is a decoder, too)."""
    if getattr(config, "is_encoder_decoder", False) and ".decoder." in f".{name}":
        return False
    found = re.search(r"\.(?:layers?|block|h)\.(\d+)\.", f".{name}")
    return found is not None and found.group(1) == "1"


def _answer_logits(model: Any, shape: Shape, attention: TreeKind) -> Tensor:
    """A family's forward over made-up inputs of this shape: logits (P, V) at the answers."""
    ids_PT = torch.zeros(shape.rows, shape.tokens, dtype=torch.long, device=META)
    answers_P = torch.zeros(shape.answers, dtype=torch.long, device=META)
    if shape.tree is not None:
        # FlexAttention reads values while it makes its mask, which meta does not have.
        mask_device = torch.device("cpu") if attention == "flex" else META
        output = model.get_decoder()(
            input_ids=ids_PT,
            position_ids=ids_PT.clone(),
            use_cache=False,
            **mask_arguments(shape.tree, attention, mask_device),
        )
        return model.lm_head(output.last_hidden_state[0, answers_P])
    # Four-dimensional already, as Transformers makes it for unequal lengths: on meta it cannot look at the values.
    mask_P1TT = torch.ones(shape.rows, 1, shape.tokens, shape.tokens, dtype=torch.bool, device=META)
    rows_P = torch.arange(shape.rows, device=META)
    family = family_of(model.config)
    if family == "seq2seq":
        encoded = model.encoder(input_ids=ids_PT, attention_mask=mask_P1TT)
        decoded = model.decoder(
            input_ids=ids_PT[:, :NUM_DECODER_TOKENS],
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=mask_P1TT[:, :, :NUM_DECODER_TOKENS],
            use_cache=False,
        )
        return model.lm_head(decoded.last_hidden_state[rows_P, answers_P])
    if family == "causal":
        output = model.get_decoder()(input_ids=ids_PT, attention_mask=mask_P1TT, use_cache=False)
    else:
        output = model.base_model(input_ids=ids_PT, attention_mask=mask_P1TT)
    head = model.lm_head if hasattr(model, "lm_head") else model.cls
    return head(output.last_hidden_state[rows_P, answers_P])


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Make attention allocate what the fused kernels do; on meta it would write out every score."""
    scaled_dot_product, flex = nn.functional.scaled_dot_product_attention, tree_attention._flex

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        # T5's learned bias, which no fused kernel takes.
        if attn_mask is not None and attn_mask.requires_grad:
            return scaled_dot_product(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                attn_mask.logical_not(), float("-inf")
            )
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        # Dropout is left out: on CUDA its mask is a single seed, and the CPU kernel has none.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    def fused_flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
        """Saves queries, keys, values, output and the log-sum of each row, as the compiled kernel does."""
        del mask
        output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=None, scale=scale
        )[0]
        return output.transpose(1, 2).contiguous()

    nn.functional.scaled_dot_product_attention, tree_attention._flex = fused, fused_flex
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention, tree_attention._flex = scaled_dot_product, flex
