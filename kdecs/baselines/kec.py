"""KEC: a directed acyclic graph of utterances whose edges carry commonsense.

Li et al., "Neutral Utterances are Also Causes: Enhancing Conversational Causal Emotion Entailment with Social
Commonsense Knowledge", IJCAI 2022. An utterance listens to the few before it; edges tell whether the two have one
speaker; with knowledge, an edge also carries what the earlier utterance is likely to do to the later one's speaker.

What differs from the paper:

- The paper gives the gold emotions of all utterances. Here none is given: a softmax over the corpus' labels (7 or 16)
  predicts them from the graph's states, and its cross-entropy is added to the loss.
- Without knowledge is the default ("without CSK" of the paper). With it, phrases are chosen by the polarity of the
  later utterance's emotion, which a small head predicts from that utterance alone, where the paper takes the gold one.
- A span head over the pair (kdecs.baselines.model.SpanHead).

The knowledge is a file of JSON lines, made elsewhere, for instance by COMET-ATOMIC-2020 with a sentiment lexicon:

    {"dialogue_id": "tr_1", "turn": 3, "relation": "xReact", "text": "feels proud", "polarity": "positive"}

`relation` is xEffect or xReact (on the speaker of the turn), oEffect or oReact (on the others); `polarity` is negative,
neutral or positive. A turn may have any number of lines, also none: its edges then carry the word "none".
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdecs.baselines.config import Kec, Task
from kdecs.baselines.dialogues import (
    UNKNOWN,
    DialogueEncoder,
    EncodedDialogue,
    Labels,
    RowGroup,
    UtteranceBatch,
    row_groups,
    utterance_batch,
)
from kdecs.baselines.model import LossPart, Output, PairView, UtteranceModel, cross_entropy
from kdecs.corpus.checking import NotJson, RepeatedKeys, decode_json, iter_lines, shorten
from kdecs.corpus.schema import FINE_TO_COARSE, NEUTRAL
from kdecs.errors import CorpusError

POLARITIES = ("negative", "neutral", "positive")
_RELATIONS = {"xEffect": 0, "xReact": 0, "oEffect": 1, "oReact": 1}
_NO_KNOWLEDGE = "none"
_MAX_KNOWLEDGE_TOKENS = 64  # of the phrases of one edge together

Knowledge = Mapping[tuple[str, int], Mapping[tuple[int, int], Sequence[str]]]
"""(dialogue id, turn) -> (0 for the same speaker or 1 for another, polarity) -> phrases."""


def read_knowledge(path: Path) -> Knowledge:
    """Read a file of commonsense phrases. Raises CorpusError, one line, at the first fault."""
    found: dict[tuple[str, int], dict[tuple[int, int], list[str]]] = {}
    try:
        for number, line in iter_lines(path):
            key, kind, text = _knowledge_line(line, f"{path}, line {number}")
            found.setdefault(key, {}).setdefault(kind, []).append(text)
    except OSError as error:
        raise CorpusError(
            f"{path}: {error.strerror or error}, expected a file of commonsense phrases"
        ) from None
    if not found:
        raise CorpusError(f"{path}: holds no line, expected a file of commonsense phrases")
    return found


def _knowledge_line(line: bytes, place: str) -> tuple[tuple[str, int], tuple[int, int], str]:
    try:
        value = decode_json(line).value
    except NotJson as error:
        raise CorpusError(f"{place}: found {error.found}, expected {error.expected}") from None
    if not isinstance(value, dict) or isinstance(value, RepeatedKeys):
        raise CorpusError(f"{place}: found {shorten(value)}, expected an object with each key once")
    wanted = {
        "dialogue_id": lambda item: isinstance(item, str),
        "turn": lambda item: type(item) is int and item >= 1,
        "relation": lambda item: item in _RELATIONS if isinstance(item, str) else False,
        "text": lambda item: isinstance(item, str) and bool(item.strip()),
        "polarity": lambda item: item in POLARITIES if isinstance(item, str) else False,
    }
    expected = {
        "dialogue_id": "a string",
        "turn": "an integer from 1",
        "relation": f"one of {', '.join(_RELATIONS)}",
        "text": "a phrase",
        "polarity": f"one of {', '.join(POLARITIES)}",
    }
    for key, is_right in wanted.items():
        if key not in value or not is_right(value[key]):
            shown = shorten(value[key]) if key in value else "no such key"
            raise CorpusError(f"{place}: {key}: found {shown}, expected {expected[key]}")
    kind = (_RELATIONS[value["relation"]], POLARITIES.index(value["polarity"]))
    return (value["dialogue_id"], value["turn"]), kind, value["text"].strip()


def polarity_of(emotion: str) -> int:
    """The polarity of an emotion: positive like happiness, neutral, or negative like all others."""
    coarse = FINE_TO_COARSE.get(emotion, emotion)
    if coarse in ("happiness", "excited"):
        return POLARITIES.index("positive")
    return POLARITIES.index("neutral" if coarse == NEUTRAL else "negative")


class KecInputs(NamedTuple):
    """The utterances, and with knowledge the phrases: K different texts, and which of them an edge may carry.

    `phrase_DN23` is the text of an utterance for a later one of the same speaker or another (2) and of a polarity (3).
    """

    utterances: UtteranceBatch
    phrases: tuple[RowGroup, ...] = ()
    phrase_DN23: Tensor | None = None


class KecModel(UtteranceModel):
    """The graph network. `knowledge` is None in the variant without commonsense."""

    def __init__(
        self,
        language_model: Any,
        system: Kec,
        emotions: Sequence[str],
        task: Task,
        knowledge: Knowledge | None = None,
    ) -> None:
        super().__init__(language_model, task, system.hidden_size)
        self.knowledge = knowledge
        size = system.hidden_size
        self.utterance = nn.Linear(self.hidden_size, size)
        self.layers = nn.ModuleList(
            DagLayer(size, system.window, has_knowledge=knowledge is not None) for _ in range(system.layers)
        )
        self.joined = nn.Linear((system.layers + 1) * size, size)
        self.emotion_head = nn.Linear(size, len(emotions))
        self.pair = nn.Sequential(
            nn.Linear(2 * size, size, bias=False),
            nn.ReLU(),
            nn.Dropout(system.dropout),
            nn.Linear(size, size, bias=False),
            nn.ReLU(),
            nn.Dropout(system.dropout),
        )
        self.pair_head = nn.Linear(size, 1, bias=False)
        self.dropout = nn.Dropout(system.dropout)
        if knowledge is not None:
            self.parts = ("polarity", *self.parts)
            self.phrase = nn.Linear(self.hidden_size, size)
            self.polarity_head = nn.Linear(size, len(POLARITIES))
        # Of labels: looked up where the losses are computed.
        polarities = torch.tensor([polarity_of(emotion) for emotion in emotions])
        self.register_buffer("polarity_E", polarities, persistent=False)
        self.polarity_E: Tensor

    def inputs(self, dialogues: Sequence[EncodedDialogue], pairs_P3: Tensor, encoder: DialogueEncoder) -> Any:
        """The utterances, and the phrases that the knowledge has for them."""
        del pairs_P3
        batch = utterance_batch(dialogues, encoder)
        if self.knowledge is None:
            return KecInputs(batch)
        texts: dict[tuple[str, ...], int] = {(_NO_KNOWLEDGE,): 0}
        phrase_DN23 = np.zeros((*batch.row_DN.shape, 2, len(POLARITIES)), dtype=np.int64)
        for index, item in enumerate(dialogues):
            for turn in range(1, len(item.token_ids) + 1):
                for kind, phrases in self.knowledge.get((item.dialogue.id, turn), {}).items():
                    number = texts.setdefault(tuple(phrases), len(texts))
                    phrase_DN23[index, turn - 1, kind[0], kind[1]] = number
        rows = []
        for phrases in texts:
            ids = [encoder.cls_id]
            for phrase in phrases:
                ids += [*encoder.tokens_of(phrase, _MAX_KNOWLEDGE_TOKENS), encoder.sep_id]
            rows.append(ids[:_MAX_KNOWLEDGE_TOKENS])
        return KecInputs(batch, row_groups(rows, encoder.pad_id), torch.from_numpy(phrase_DN23))

    def utterances(self, inputs: KecInputs) -> UtteranceBatch:
        """The utterances among the inputs."""
        return inputs.utterances

    def view(self, inputs: KecInputs, states_RTH: Tensor, pairs_P3: Tensor) -> PairView:
        """The utterances' vectors through the graph's layers, and the pairs from what all layers say."""
        batch = inputs.utterances
        is_text_RM1 = batch.is_text_RM[..., None]
        text_RMH = states_RTH[:, 1 : 1 + batch.is_text_RM.size(1)]
        longest_RH = text_RMH.masked_fill(~is_text_RM1, -torch.inf).amax(1)
        state_DNC = self.utterance(longest_RH)[batch.row_DN]
        same_DNN = batch.speaker_DN[:, :, None] == batch.speaker_DN[:, None]
        polarity_DN3 = phrases = None
        if inputs.phrase_DN23 is not None:
            polarity_DN3 = self.polarity_head(state_DNC)
            phrases = Phrases(
                self.phrase_vectors(inputs.phrases), inputs.phrase_DN23, polarity_DN3.argmax(-1).detach()
            )
        levels = [state_DNC]
        for layer in self.layers:
            levels.append(layer(levels[-1], same_DNN, phrases))
        final_DNC = self.dropout(self.joined(torch.cat(levels, -1)))
        dialogue_P, target_P, candidate_P = pairs_P3.unbind(1)
        both_PC = torch.cat((final_DNC[dialogue_P, candidate_P], final_DNC[dialogue_P, target_P]), -1)
        vector_PV = self.pair(both_PC)
        return PairView(
            self.emotion_head(final_DNC), self.pair_head(vector_PV).squeeze(-1), vector_PV, polarity_DN3
        )

    def phrase_vectors(self, groups: tuple[RowGroup, ...]) -> Tensor:
        """(K, C): the phrases of an edge, encoded as an utterance is."""
        found = []
        for group in groups:
            states_GTH = self.states_of(group).masked_fill(~group.attention_GT[..., None], -torch.inf)
            found.append(functional.relu(self.phrase(states_GTH.amax(1))))
        return torch.cat(found)[torch.argsort(torch.cat([group.rows_G for group in groups]))]

    def losses(self, output: Output, labels: Labels, spanned_P: Tensor) -> list[LossPart]:
        """Those of every utterance-wise system, and with knowledge that of the polarity."""
        found = super().losses(output, labels, spanned_P)
        if output.own is None:
            return found
        emotion_DN = labels.emotion_DN
        polarity_DN = torch.where(emotion_DN == UNKNOWN, UNKNOWN, self.polarity_E[emotion_DN.clamp(min=0)])
        return [cross_entropy(output.own.flatten(0, 1), polarity_DN.flatten()), *found]


class Phrases(NamedTuple):
    """The vectors of all phrases, which of them each utterance offers, and the polarity that a later one asks for."""

    vectors_KC: Tensor
    phrase_DN23: Tensor
    polarity_DN: Tensor

    def on_edges(self, earlier: slice, later: int, is_same_DW: Tensor) -> Tensor:
        """(D, W, C): what some earlier utterances offer to a later one."""
        offered_DW23 = self.phrase_DN23[:, earlier]
        by_speaker_DW3 = torch.where(is_same_DW[..., None], offered_DW23[:, :, 0], offered_DW23[:, :, 1])
        wanted_DW1 = self.polarity_DN[:, later, None, None].expand(-1, by_speaker_DW3.size(1), 1)
        return self.vectors_KC[by_speaker_DW3.gather(-1, wanted_DW1).squeeze(-1)]


class DagLayer(nn.Module):
    """One layer of the graph, utterance by utterance: each hears those before it as this layer has left them."""

    def __init__(self, size: int, window: int, *, has_knowledge: bool) -> None:
        super().__init__()
        self.window = window
        self.attention = nn.Linear(2 * size, 1)
        self.of_same, self.of_other = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.context, self.past = nn.GRUCell(size, size), nn.GRUCell(size, size)
        if has_knowledge:
            self.edge = nn.Linear(size, size, bias=False)
            self.knowledge, self.itself = nn.GRUCell(size, size), nn.GRUCell(size, size)

    def forward(self, state_DNC: Tensor, same_DNN: Tensor, phrases: Phrases | None) -> Tensor:
        """(D, N, C): h_i' = GRU_c(h_i, M) + GRU_p(M, h_i) [+ GRU_k(K, h_i) + GRU_s(k_ii, h_i)].

        M sums the messages of the earlier utterances by attention, K the knowledge on their edges.
        """
        found: list[Tensor] = []
        for i in range(state_DNC.size(1)):
            own_DC = state_DNC[:, i]
            message_DC = knowledge_DC = torch.zeros_like(own_DC)
            if i:
                earlier = slice(max(0, i - self.window), i)
                is_same_DW = same_DNN[:, i, earlier]
                before_DWC = torch.stack(found[earlier], 1)
                heard_DWC = before_DWC
                edge_DWC = None
                if phrases is not None:
                    edge_DWC = self.edge(phrases.on_edges(earlier, i, is_same_DW))
                    heard_DWC = before_DWC + edge_DWC
                both_DW2C = torch.cat((own_DC[:, None].expand_as(heard_DWC), heard_DWC), -1)
                weight_DW1 = functional.softmax(self.attention(both_DW2C), 1)
                told_DWC = torch.where(
                    is_same_DW[..., None], self.of_same(before_DWC), self.of_other(before_DWC)
                )
                message_DC = (weight_DW1 * told_DWC).sum(1)
                if edge_DWC is not None:
                    knowledge_DC = (weight_DW1 * edge_DWC).sum(1)
            new_DC = self.context(own_DC, message_DC) + self.past(message_DC, own_DC)
            if phrases is not None:
                is_same_D1 = torch.ones_like(same_DNN[:, i, :1])
                itself_DC = phrases.on_edges(slice(i, i + 1), i, is_same_D1)[:, 0]
                new_DC = new_DC + self.knowledge(knowledge_DC, own_DC) + self.itself(itself_DC, own_DC)
            found.append(new_DC)
        return torch.stack(found, 1)
