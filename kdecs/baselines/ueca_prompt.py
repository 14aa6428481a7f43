"""UECA-Prompt: emotions, causes and pairs as words at three masks per utterance.

Zheng et al., "UECA-Prompt: Universal Prompt for Emotion Cause Analysis", COLING 2022. The document is one sequence for
a masked language model, each utterance with its number and three masks: its emotion, whether it is a cause, and the
number of the utterance whose emotion it causes, or "none".

What differs from the paper:

- One sequence per target i, over u_1 … u_i. So no prediction sees later utterances, and an utterance may cause several
  emotions, for which the paper's sequence of the whole document has a single mask.
- The first mask holds the emotion's own word (7 or 16 labels) instead of yes or no. It is trained and read at the
  target alone, as each utterance is the target of one sequence.
- The second mask says whether the utterance causes the target's emotion. It is trained beside the third, which alone
  decides; the paper's decoding does the same.
- Each softmax is over the answer words of its mask, not over the vocabulary, and the number in front of an utterance,
  which the released code trains to be copied, has no loss.
- A pair is a cause if the probability of the target's number reaches a threshold chosen on the validation split.
- No spans: the paper has none, and Table 4 leaves those cells empty.

Legend: R sequences, one per target that is asked for; I numbers and "none".
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kdecs.baselines.config import UecaPrompt
from kdecs.baselines.dialogues import (
    UNKNOWN,
    DialogueEncoder,
    EncodedDialogue,
    Labels,
    RowGroup,
    row_groups,
)
from kdecs.baselines.model import BaselineModel, LossPart, Output, cross_entropy
from kdecs.corpus.answer_words import answer_token_ids
from kdecs.errors import DialogueError
from kdecs.student.model import check_head, head_states, longest_prompt

YES_NO = ("yes", "no")
NONE = "none"
_MASKS = 3
_NEVER = (
    -30.0
)  # the logit of a pair that the sequence does not hold or the window excludes: a probability of 1e-13


class UecaInputs(NamedTuple):
    """Sequences of targets. A pair's place is that of its candidate's second mask in the row of its target.

    `row_P` and `place_P` are 0 where `is_held_P` is not set: the candidate is older than the sequence reaches.
    `number_R` is the target's number, counted from 0, and `emotion_R` the place of the target's first mask.
    """

    groups: tuple[RowGroup, ...]
    target_R2: Tensor
    emotion_R: Tensor
    number_R: Tensor
    row_P: Tensor
    place_P: Tensor
    is_held_P: Tensor


class UecaReading(NamedTuple):
    """The logits of the second and the third mask of each pair, and the target's number."""

    is_cause_P2: Tensor
    index_PI: Tensor
    number_P: Tensor
    is_held_P: Tensor


class UecaModel(BaselineModel):
    """The masked language model alone: nothing is added to it."""

    parts = ("emotion", "is_cause", "index")

    def __init__(
        self, language_model: Any, system: UecaPrompt, emotions: Sequence[str], tokenizer: Any
    ) -> None:
        super().__init__(language_model)
        check_head(language_model)
        self.system = system
        self.max_tokens = longest_prompt(tokenizer, language_model, system.max_tokens)
        self.mask_id: int = tokenizer.mask_token_id
        numbers = [str(number) for number in range(1, system.max_utterances + 1)]
        stand_ins = {word: other for word, other in system.stand_ins.items() if word in emotions}
        words = (
            answer_token_ids(tokenizer, emotions, before="feels ", after=" .", stand_ins=stand_ins),
            answer_token_ids(tokenizer, YES_NO, before="feels ", after=" ."),
            answer_token_ids(tokenizer, (*numbers, NONE), before="feels ", after=" ."),
        )
        for name, ids in zip(("emotion_ids", "yes_no_ids", "index_ids"), words, strict=True):
            # The card's words give them again, so they are not saved.
            self.register_buffer(name, torch.tensor(ids), persistent=False)
        self.emotion_ids: Tensor
        self.yes_no_ids: Tensor
        self.index_ids: Tensor

    def inputs(self, dialogues: Sequence[EncodedDialogue], pairs_P3: Tensor, encoder: DialogueEncoder) -> Any:
        """A sequence for each target among the pairs."""
        numbers = self.index_ids.tolist()
        rows: list[list[int]] = []
        targets: dict[tuple[int, int], int] = {}
        first: list[int] = []  # the oldest utterance that a row holds
        masks: list[list[int]] = []  # the place of the first mask of each utterance of a row
        for dialogue, target in dict.fromkeys((d, i) for d, i, _ in pairs_P3.tolist()):
            targets[dialogue, target] = len(rows)
            start = self._oldest(dialogues[dialogue], target)
            ids, places = [encoder.cls_id], []
            for number, tokens in enumerate(dialogues[dialogue].token_ids[start : target + 1]):
                ids += [numbers[number], *tokens]
                places.append(len(ids))
                ids += [*[self.mask_id] * _MASKS, encoder.sep_id]
            rows.append(ids)
            first.append(start)
            masks.append(places)
        row_P, place_P, is_held_P = [], [], []
        for dialogue, target, candidate in pairs_P3.tolist():
            row = targets[dialogue, target]
            is_held = candidate >= first[row]
            is_held_P.append(is_held)
            row_P.append(row if is_held else 0)
            place_P.append(masks[row][candidate - first[row]] + 1 if is_held else 0)
        return UecaInputs(
            row_groups(rows, encoder.pad_id),
            torch.tensor(list(targets)).reshape(-1, 2),
            torch.tensor([places[-1] for places in masks]),
            torch.tensor([len(places) - 1 for places in masks]),
            torch.tensor(row_P),
            torch.tensor(place_P),
            torch.tensor(is_held_P),
        )

    def _oldest(self, dialogue: EncodedDialogue, target: int) -> int:
        """The first utterance of the sequence: older ones do not fit into it. Raises DialogueError."""
        left = self.max_tokens - 1
        start = target + 1
        while start > 0 and target + 1 - start < self.system.max_utterances:
            left -= len(dialogue.token_ids[start - 1]) + _MASKS + 2
            if left < 0:
                break
            start -= 1
        if start > target:
            raise DialogueError(
                f"dialogue {dialogue.dialogue.id}, turn {target + 1}: the utterance alone does not fit into "
                f"{self.max_tokens} tokens; train with a larger system.max_tokens or a smaller "
                "model.max_utterance_tokens"
            )
        return start

    def forward(self, inputs: UecaInputs, pairs_P3: Tensor, spanned_P: Tensor) -> Output:
        """Words at the masks; `cause_P` is the logit of the probability of the target's number at the third one."""
        del spanned_P
        # Only the masks' states are kept of each group of rows: those of a long dialogue would fill the memory.
        num_rows, num_pairs = len(inputs.emotion_R), len(inputs.row_P)
        device = pairs_P3.device
        places, states = [], []
        for group in inputs.groups:
            local = torch.full((num_rows,), -1, device=device)
            local[group.rows_G] = torch.arange(len(group.rows_G), device=device)
            is_here_P = (local[inputs.row_P] >= 0) & inputs.is_held_P
            pairs_here = is_here_P.nonzero().squeeze(1)
            states_GTH = self.states_of(group)
            places += [group.rows_G, num_rows + pairs_here, num_rows + num_pairs + pairs_here]
            row, place = local[inputs.row_P[pairs_here]], inputs.place_P[pairs_here]
            own = torch.arange(len(group.rows_G), device=device)
            states += [
                states_GTH[own, inputs.emotion_R[group.rows_G]],
                states_GTH[row, place],
                states_GTH[row, place + 1],
            ]
        found_H = head_states(self.language_model, torch.cat(states))
        all_H = found_H.new_zeros(num_rows + 2 * num_pairs, found_H.size(-1))
        all_H = all_H.index_copy(0, torch.cat(places), found_H)
        emotion_RH, is_cause_PH, index_PH = all_H.split((num_rows, num_pairs, num_pairs))
        index_PI = self._words(index_PH, self.index_ids)
        number_P = inputs.number_R[inputs.row_P]
        p_PI = functional.softmax(index_PI, -1)
        p_P = p_PI.gather(1, number_P[:, None]).squeeze(1).clamp(1e-12, 1 - 1e-6)
        is_open_P = inputs.is_held_P
        if self.system.window is not None:
            is_open_P = is_open_P & (pairs_P3[:, 1] - pairs_P3[:, 2] <= self.system.window)
        emotion_RE = self._words(emotion_RH, self.emotion_ids)
        size = (int(inputs.target_R2[:, 0].max()) + 1, int(inputs.target_R2[:, 1].max()) + 1)
        emotion_DNE = emotion_RE.new_zeros(*size, emotion_RE.size(1))
        return Output(
            emotion_DNE.index_put(tuple(inputs.target_R2.unbind(1)), emotion_RE),
            torch.where(is_open_P, torch.logit(p_P), _NEVER),
            own=(
                UecaReading(self._words(is_cause_PH, self.yes_no_ids), index_PI, number_P, inputs.is_held_P),
                inputs.target_R2,
            ),
        )

    def _words(self, states_BH: Tensor, ids_A: Tensor) -> Tensor:
        decoder = self.language_model.get_output_embeddings()
        bias_A = None if decoder.bias is None else decoder.bias[ids_A]
        return functional.linear(states_BH, decoder.weight[ids_A], bias_A).float()

    def losses(self, output: Output, labels: Labels, spanned_P: Tensor) -> list[LossPart]:
        """The cross-entropies of the three masks, each over its answer words, with equal weights."""
        del spanned_P
        reading, target_R2 = output.own
        dialogue_R, target_R = target_R2.unbind(1)
        none = len(self.index_ids) - 1
        # What the sequence does not hold has no mask to learn at.
        is_known_P = reading.is_held_P & (labels.is_cause_P != UNKNOWN)
        index_P = torch.where(labels.is_cause_P == 1, reading.number_P, none)
        yes_no_P = 1 - labels.is_cause_P
        return [
            cross_entropy(output.emotion_DNE[dialogue_R, target_R], labels.emotion_DN[dialogue_R, target_R]),
            cross_entropy(reading.is_cause_P2, torch.where(is_known_P, yes_no_P, UNKNOWN)),
            cross_entropy(reading.index_PI, torch.where(is_known_P, index_P, UNKNOWN)),
        ]
