"""Memory of a forward and a backward: the teacher's own network, run on the meta device with a small number of layers.

Nothing is computed and nothing but shapes is held, so a 13 B network takes a fraction of a second. Layers are alike,
so two depths give the line on which every depth lies. Frozen weights, adapters and gradients are counted elsewhere.

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
from kdecs.teacher.metering import NUM_DECODER_TOKENS
from kdecs.teacher.network import family_of, meta_network
from kdecs.teacher.tree import attention as tree_attention
from kdecs.teacher.tree.attention import mask_arguments, use_tree_attention
from kdecs.teacher.tree.prefix_tree import PackedTree


class TensorMemory(TorchDispatchMode):
    """Counts operators, and live bytes of storages made inside the `with` block; `known` tensors are left out."""

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
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def release(self, tensor: Tensor) -> None:
        """Stop counting a tensor that from now on belongs to something counted elsewhere (a gradient)."""
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
            # An address is used again once its storage is gone: only the entry of this very storage is dropped.
            if self._counted.get(key) is reference:
                del self._counted[key]
                self.live_bytes -= num_bytes

        return forget


TreeKind = Literal["flex", "blocks", "mask"]
"""How a tree attends, as `kdecs.teacher.tree.attention` has it: flex on CUDA, blocks on CPU."""

_DEPTHS = (3, 5)
META = torch.device("meta")


@dataclass(frozen=True)
class Shape:
    """One micro-batch: a packed tree (rows 1), or `rows` prompts padded to `tokens` each; answers at leaves."""

    rows: int
    tokens: int
    answers: int
    tree: PackedTree | None = None


@dataclass(frozen=True)
class Activations:
    """Highest bytes until the backward has left the upper layers, and at its end, where all gradients stand.

    `launches`: operators that a forward and a backward run.
    """

    peak_bytes: int
    backward_end_bytes: int
    launches: int


class ActivationTracer:
    """Traces micro-batches of one training. `config` is a Transformers config of any depth.

    `lora` None is full tuning; `attention` is a tree's. Networks are kept between traces.
    """

    def __init__(
        self, config: Any, lora: LoraConfig | None, *, dtype: torch.dtype, attention: TreeKind
    ) -> None:
        self.config = config
        self.lora = lora
        self.dtype = dtype
        self.attention: TreeKind = attention
        self._networks: dict[tuple[int, bool], Any] = {}

    def memory(self, shape: Shape, *, checkpointing: bool) -> Activations:
        """Highest bytes of activations and temporaries of a micro-batch, forward and backward."""
        shallow, deep = (self.memory_at_depth(shape, depth, checkpointing=checkpointing) for depth in _DEPTHS)
        layers = (self.config.num_hidden_layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
        return between(shallow, deep, layers, end=deep.backward_end_bytes)

    def memory_at_depth(self, shape: Shape, depth: int, *, checkpointing: bool) -> Activations:
        """The same for a network of `depth` layers (at least 3), run as it is."""
        network = self._network(depth, checkpointing)
        base = _base_of(network)
        memory = TensorMemory([*network.parameters(), *network.buffers()])
        peaks: list[int] = []

        def accumulated(parameter: nn.Parameter, is_second_layer: bool) -> None:
            memory.release(parameter.grad)  # a gradient is counted by ZeRO's rules, not here
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
            log_p_PA.logsumexp(dim=-1).sum().backward()
        for hook in hooks:
            hook.remove()
        network.zero_grad(set_to_none=True)
        return Activations(peaks[0], memory.peak_bytes, memory.num_operators)

    def _network(self, depth: int, checkpointing: bool) -> Any:
        if (depth, checkpointing) not in self._networks:
            network = meta_network(_of_depth(self.config, depth), self.lora, dtype=self.dtype)
            # DeepSpeed casts adapters, which PEFT makes in float32, to the dtype of the engine.
            for parameter in network.parameters():
                parameter.data = parameter.data.to(self.dtype)
            base = _base_of(network)
            base.config.use_cache = False
            if family_of(self.config) == "causal":
                use_tree_attention(base)
            if checkpointing:
                base.activation_checkpointing_enable()
                base.enable_input_require_grads()
            self._networks[depth, checkpointing] = network.train()
        return self._networks[depth, checkpointing]


def between(a: Activations, b: Activations, position: float, *, end: int | None = None) -> Activations:
    """The point of the line through a (position 0) and b (position 1); `end` where the end does not lie on it."""
    values = {
        name: round(getattr(a, name) + (getattr(b, name) - getattr(a, name)) * position)
        for name in ("peak_bytes", "backward_end_bytes", "launches")
    }
    return Activations(**values if end is None else {**values, "backward_end_bytes": end})


def _base_of(network: Any) -> Any:
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _of_depth(config: Any, depth: int) -> Any:
    """The config with that many layers (in encoder and decoder each)."""
    shallow = deepcopy(config)
    shallow.num_hidden_layers = depth
    if getattr(shallow, "is_encoder_decoder", False):
        shallow.num_decoder_layers = depth
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:depth]
    return shallow


def _is_second_layer(name: str, config: Any) -> bool:
    """Whether a parameter is of the stack's second layer from below (the encoder's, where there are two)."""
    if getattr(config, "is_encoder_decoder", False) and ".decoder." in f".{name}":
        return False
    found = re.search(r"\.(?:layers?|block|h)\.(\d+)\.", f".{name}")
    return found is not None and found.group(1) == "1"


def _answer_logits(model: Any, shape: Shape, attention: TreeKind) -> Tensor:
    """What a family's forward does, by shape: logits (P, V) at the answers."""
    ids_PT = torch.zeros(shape.rows, shape.tokens, dtype=torch.long, device=META)
    answers_P = torch.zeros(shape.answers, dtype=torch.long, device=META)
    if shape.tree is not None:
        output = model.get_decoder()(
            input_ids=ids_PT,
            position_ids=ids_PT.clone(),
            use_cache=False,
            **_tree_mask(shape.tree, attention),
        )
        return model.lm_head(output.last_hidden_state[0, answers_P])
    # Already four-dimensional, as Transformers makes it where lengths differ: it cannot look at values on meta.
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
    return _head(model)(output.last_hidden_state[rows_P, answers_P])


def _head(model: Any) -> nn.Module:
    return model.lm_head if hasattr(model, "lm_head") else model.cls


def _tree_mask(tree: PackedTree, attention: TreeKind) -> dict[str, Any]:
    """As the family's forward makes it. FlexAttention's mask is looked at while it is made, so not on meta."""
    return mask_arguments(tree, attention, torch.device("cpu") if attention == "flex" else META)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On meta, attention would write out every score: have it allocate what the fused kernels do."""
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
        if attn_mask is not None and attn_mask.requires_grad:  # T5's learned bias: no fused kernel takes it
            return scaled_dot_product(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                attn_mask.logical_not(), float("-inf")
            )
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        # Without dropout: on CUDA its mask is one seed, and the CPU kernel takes none.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    def fused_flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
        """Saves queries, keys, values, output and the logarithm of each row's sum, as the compiled kernel does."""
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
