"""MGSAG: utterances joined by their keywords (fine) and with one another (coarse).

Bao et al., "Multi-Granularity Semantic Aware Graph Model for Reducing Position Bias in Emotion Cause Pair Extraction",
Findings of ACL 2022. The authors have published no code, and this module follows the abstract alone, so a score of it
is that of a system in MGSAG's manner. The abstract says four things, and all four hold here:

- Clauses depend on keywords that are extracted from the document, which gives keyword-enhanced clause vectors (fine).
- A graph joins the clauses with one another (coarse).
- Both take part jointly in finding emotions, causes and pairs.
- Nothing limits or counts the distance of two clauses, so that the model cannot learn that causes are near.

All else is a choice made here:

- Keywords are the words of three letters or more that are no English stop words; two utterances share a keyword if they
  have the same word, in whatever case. Keywords are not ranked: a rank would depend on utterances that come later.
- Fine graph: graph attention (LeakyReLU of two projections) from the utterances that hold a keyword to the keyword,
  then from the keywords of an utterance to it. A keyword begins as the mean of its tokens' word vectors.
- Coarse graph: one layer of multi-head attention over the utterances, which begin as the encoder's [CLS].
- Fusion: the sum of utterance and fine vector, concatenated with the coarse one.
- Heads: one for emotions and one for causes per utterance. A pair is scored by an MLP over [e_i ; c_j ; f_ij], with
  f_ij the share of j in what i receives through shared keywords. The three cross-entropies have equal weights.

What differs for dialogues and spans, as in the other systems:

- Emotions are a softmax over the corpus' labels (7 or 16).
- A span head over the pair (kdecs.baselines.model.SpanHead).
- Causality: target i receives from u_1 … u_i alone, in both graphs.

Legend: K keywords of a dialogue, L tokens of a keyword.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdecs.baselines.config import Mgsag, Task
from kdecs.baselines.dialogues import (
    DialogueEncoder,
    EncodedDialogue,
    Labels,
    UtteranceBatch,
    utterance_batch,
)
from kdecs.baselines.model import LossPart, Output, PairView, UtteranceModel, causal_mask, cross_entropy

_TOKENS_PER_WORD = 4
_WORD = re.compile(r"[^\W\d_]{3,}")
# Words of English that carry no topic, so that two utterances share little if they share one.
_STOP_WORDS = frozenset(
    """
    about above after again against all also and any are because been before being below between both but can
    could did does doing don down during each else ever few for from further get going got had has have having
    her here hers herself him himself his how into its itself just know let like may might mine more most much
    must myself nor not now off okay once one only other our ours out over own really right said same say see
    shall she should some such sure take than that the their theirs them then there these they thing think this
    those through too under until very want was way well were what when where which while who whom whose why
    will with won would yeah yes yet you your yours
    """.split()  # noqa: SIM905 (a paragraph that can be read and edited)
)


class MgsagInputs(NamedTuple):
    """The utterances, the keywords' tokens with their share in the mean (0 for padding), and who holds which."""

    utterances: UtteranceBatch
    token_ids_DKL: Tensor
    share_DKL: Tensor
    holds_DNK: Tensor


class MgsagModel(UtteranceModel):
    """The two graphs and the joint heads."""

    parts = ("emotion", "cause", "pair")

    def __init__(self, language_model: Any, system: Mgsag, num_emotions: int, task: Task) -> None:
        super().__init__(language_model, task, system.hidden_size)
        self.system = system
        size = system.hidden_size
        self.utterance = nn.Linear(self.hidden_size, size)
        self.keyword = nn.Linear(self.hidden_size, size)
        self.to_keyword, self.to_utterance = BipartiteAttention(size), BipartiteAttention(size)
        self.coarse = nn.MultiheadAttention(size, system.heads, dropout=system.dropout, batch_first=True)
        self.emotion_side, self.cause_side = nn.Linear(2 * size, size), nn.Linear(2 * size, size)
        self.emotion_head, self.cause_head = nn.Linear(size, num_emotions), nn.Linear(size, 2)
        self.pair = nn.Linear(2 * size + 1, size)
        self.pair_head = nn.Linear(size, 1)
        self.dropout = nn.Dropout(system.dropout)

    def inputs(self, dialogues: Sequence[EncodedDialogue], pairs_P3: Tensor, encoder: DialogueEncoder) -> Any:
        """The utterances and their keywords; those that a dialogue has beyond its share are its latest."""
        del pairs_P3
        batch = utterance_batch(dialogues, encoder)
        words_of = [[content_words(u.text) for u in item.dialogue.utterances] for item in dialogues]
        keywords = [
            list(dict.fromkeys(word for words in utterances for word in words))[: self.system.keywords]
            for utterances in words_of
        ]
        shape = (len(dialogues), max(1, *map(len, keywords)), _TOKENS_PER_WORD)
        token_ids_DKL = np.full(shape, encoder.pad_id, dtype=np.int64)
        share_DKL = np.zeros(shape, dtype=np.float32)
        holds_DNK = np.zeros((*batch.row_DN.shape, shape[1]), dtype=bool)
        for index, (words, utterances) in enumerate(zip(keywords, words_of, strict=True)):
            place = {word: number for number, word in enumerate(words)}
            for number, word in enumerate(words):
                ids = encoder.tokens_of(f" {word}", _TOKENS_PER_WORD)
                token_ids_DKL[index, number, : len(ids)] = ids
                share_DKL[index, number, : len(ids)] = 1 / max(1, len(ids))
            for turn, held in enumerate(utterances):
                holds_DNK[index, turn, [place[word] for word in held if word in place]] = True
        return MgsagInputs(batch, *map(torch.from_numpy, (token_ids_DKL, share_DKL, holds_DNK)))

    def utterances(self, inputs: MgsagInputs) -> UtteranceBatch:
        """The utterances among the inputs."""
        return inputs.utterances

    def view(self, inputs: MgsagInputs, states_RTH: Tensor, pairs_P3: Tensor) -> PairView:
        """Fine graph, coarse graph, fusion, heads."""
        batch, holds_DNK = inputs.utterances, inputs.holds_DNK
        utterance_DNC = self.utterance(self.dropout(self.first_states(batch, states_RTH)))
        words_DKLH = self.language_model.get_input_embeddings()(inputs.token_ids_DKL)
        keyword_DKC = self.keyword((words_DKLH * inputs.share_DKL[..., None]).sum(2))
        sees_NN = causal_mask(utterance_DNC.size(1), utterance_DNC.device)
        # Keyword k as target i knows it: from the utterances up to i that hold it. (D, N, K, N)
        is_heard_DNKN = holds_DNK.transpose(1, 2)[:, None] & sees_NN[:, None]
        weight_DNKN = self.to_keyword(keyword_DKC[:, None], utterance_DNC[:, None], is_heard_DNKN)
        told_DNC = self.to_keyword.value(utterance_DNC)
        keyword_DNKC = keyword_DKC[:, None] + torch.einsum("dikj,djc->dikc", weight_DNKN, told_DNC)
        # Utterance i as its keywords enhance it. (D, N, 1, K)
        weight_DN1K = self.to_utterance(utterance_DNC[:, :, None], keyword_DNKC, holds_DNK[:, :, None])
        fine_DNC = (weight_DN1K @ self.to_utterance.value(keyword_DNKC)).squeeze(2)
        through_DNN = (weight_DN1K @ weight_DNKN).squeeze(2)
        coarse_DNC, _ = self.coarse(
            utterance_DNC, utterance_DNC, utterance_DNC, attn_mask=~sees_NN, need_weights=False
        )
        fused_DN2C = self.dropout(torch.cat((utterance_DNC + fine_DNC, coarse_DNC), -1))
        emotion_DNC = functional.relu(self.emotion_side(fused_DN2C))
        cause_DNC = functional.relu(self.cause_side(fused_DN2C))
        dialogue_P, target_P, candidate_P = pairs_P3.unbind(1)
        joined = (
            emotion_DNC[dialogue_P, target_P],
            cause_DNC[dialogue_P, candidate_P],
            through_DNN[dialogue_P, target_P, candidate_P, None],
        )
        vector_PV = functional.relu(self.pair(torch.cat(joined, -1)))
        return PairView(
            self.emotion_head(emotion_DNC),
            self.pair_head(self.dropout(vector_PV)).squeeze(-1),
            vector_PV,
            self.cause_head(cause_DNC),
        )

    def losses(self, output: Output, labels: Labels, spanned_P: Tensor) -> list[LossPart]:
        """Emotions, causes and pairs with equal weights, and spans."""
        emotion, *rest = super().losses(output, labels, spanned_P)
        return [emotion, cross_entropy(output.own.flatten(0, 1), labels.causes_DN.flatten()), *rest]


class BipartiteAttention(nn.Module):
    """Graph attention from the nodes of one side to those of the other; a node without neighbours receives nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.receiver, self.sender = nn.Linear(size, 1), nn.Linear(size, 1)
        self.value = nn.Linear(size, size, bias=False)

    def forward(self, receivers: Tensor, senders: Tensor, is_edge: Tensor) -> Tensor:
        """Weights (…, receivers, senders), which add up to 1 over the senders of each receiver that has any."""
        scores = functional.leaky_relu(self.receiver(receivers) + self.sender(senders).transpose(-1, -2))
        # Not -inf: the softmax over nothing would be NaN, and so would its gradient be.
        weights = functional.softmax(scores.masked_fill(~is_edge, -1e4).float(), -1) * is_edge
        return weights.to(scores.dtype)


def content_words(text: str) -> list[str]:
    """The words of an utterance that may be keywords: three letters or more and no stop word, once each, in order."""
    words = (word.lower() for word in _WORD.findall(text))
    return [word for word in dict.fromkeys(words) if word not in _STOP_WORDS]
