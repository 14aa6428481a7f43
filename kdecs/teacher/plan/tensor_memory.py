"""How many bytes of tensors live at once while a piece of torch code runs, on any device, meta included.

Every tensor that an operator returns is counted by its storage, from its making until its storage is freed: saved
activations, temporaries between operators, gradients. What a kernel allocates inside itself is not seen.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
