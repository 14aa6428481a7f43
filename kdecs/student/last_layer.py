"""The encoder's last feed-forward at the tokens that are read, and not at the rest.

Nothing above the last layer mixes tokens, and a student reads some of them: the first, the masks, the candidate's copy.
The feed-forward is two thirds of a layer's products: a ninth of MiniLM-L6's six layers, an eighteenth of twelve.

Legend: B prompts, T tokens, P tokens that are read, H hidden.
"""

import threading
from typing import Any

import torch
from torch import Tensor


class EncoderStates:
    """States of an encoder's last layer at places of each prompt.

    Layers of BERT's build (RoBERTa, XLM-R, BERT and its kin) compute the last feed-forward there alone; of others,
    and of an encoder that is `compile`d as a whole, the places are taken from all states.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self._places = threading.local()  # a served student answers several requests at once
        self._is_narrow = False
        layers = getattr(getattr(encoder, "encoder", None), "layer", None)
        last: Any = None if layers is None else layers[-1]
        # A base may ask for the feed-forward in chunks of tokens: then it is not called with all of them.
        if hasattr(last, "feed_forward_chunk") and not encoder.config.chunk_size_feed_forward:
            self._is_narrow = True
            self._whole = last.feed_forward_chunk
            last.feed_forward_chunk = self._feed_forward

    def compile(self) -> None:
        """Compile the encoder with symbolic lengths: they differ from batch to batch."""
        self._is_narrow = False
        self.encoder.compile(dynamic=True)

    def __call__(self, token_ids_BT: Tensor, attention_BT: Tensor, places_BP: Tensor) -> Tensor:
        """(B, P, H): the states at the places; a place may stand several times."""
        if not self._is_narrow:
            return _at(self.encoder(input_ids=token_ids_BT, attention_mask=attention_BT)[0], places_BP)
        self._places.now = places_BP
        try:
            return self.encoder(input_ids=token_ids_BT, attention_mask=attention_BT)[0]
        finally:
            self._places.now = None

    def _feed_forward(self, states_BTH: Tensor) -> Tensor:
        places_BP = getattr(self._places, "now", None) if self._is_narrow else None
        return self._whole(states_BTH if places_BP is None else _at(states_BTH, places_BP))


def _at(states_BTH: Tensor, places_BP: Tensor) -> Tensor:
    index = places_BP.unsqueeze(-1).expand(-1, -1, states_BTH.size(-1))
    return torch.gather(states_BTH, 1, index)
