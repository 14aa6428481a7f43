"""The student (Eq. 5-9): a masked language model read at its masks, and two span heads.

Legend: B pairs, R sequences (R = B in the layout pair), T tokens, H hidden, E emotions, A connective answer words,
M tokens of u_j's copy, S = M + 1 span places (0 = no span), P places read per pair, L longest prompt.

A step of a `*ForMaskedLM` spends most of its head on tokens that nobody reads. Here the last layer is computed only
where it is read (`EncoderStates`), the head of the language model sees only the word masks, and only the answer words'
rows of the output embedding are multiplied. Which outputs there are depends on the mode (`Outputs`).
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForMaskedLM

from kdecs.artifact import atomic_path, write_json
from kdecs.corpus.answer_words import CONNECTIVES, answer_token_ids
from kdecs.corpus.encoding import EncodedPair
from kdecs.corpus.pairs import Ints, batches_of_tokens, encoded_targets
from kdecs.errors import ArtifactError, ModelError
from kdecs.models import first_position, load_pretrained, load_tokenizer, save_pretrained
from kdecs.process import refusing
from kdecs.runtime import autocast, start_runtime
from kdecs.student.config import CARD_NAME, Outputs, SpanHeadName, StudentCard, read_card
from kdecs.student.data import Batch, encoded_batch
from kdecs.student.decision import Logits
from kdecs.student.priors import PRIOR_NAMES, Priors
from kdecs.trees import tree_inputs

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
HEADS_NAME = "heads.safetensors"
STUDENT_NAMES = (MODEL_FOLDER, HEADS_NAME, CARD_NAME)
"""What `save_student` writes."""

_DEFAULT_OUTPUTS = Outputs()


class StudentOutput(NamedTuple):
    """Raw logits, None for what the mode does not predict. Span logits are -inf beyond a pair's own tokens."""

    emotion_BE: Tensor | None
    connective_BA: Tensor | None
    start_BS: Tensor | None
    end_BS: Tensor | None
    classifier_B2: Tensor | None = None
    vocabulary_BV: Tensor | None = None
    """At mask_cau, over the whole vocabulary; only in a training that distils it."""

    def arrays(self) -> Logits:
        """The logits that decide, in float32 on the CPU."""
        deciding = self[: len(Logits._fields)]
        return Logits(*(None if part is None else part.float().cpu().numpy() for part in deciding))


@dataclass(frozen=True)
class AnswerIds:
    """Token ids of the emotions' and the connectives' answer words."""

    emotions: tuple[int, ...]
    connectives: tuple[int, ...]


class PositionSpanHead(nn.Module):
    """Eq. 8-9 as written: softmax(h W + b) over the positions of the prompt, W of H × L.

    Only position 0 (no span) and those of u_j's copy are allowed, so the softmax is over these places alone.
    """

    def __init__(self, hidden_size: int, max_positions: int) -> None:
        super().__init__()
        self.start = nn.Linear(hidden_size, max_positions)
        self.end = nn.Linear(hidden_size, max_positions)

    def forward(
        self, start_BH: Tensor, end_BH: Tensor, tokens_BMH: Tensor, candidate_BM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, S) of start and end."""
        del tokens_BMH
        # The 0 in front is the prompt's first position, whose logit stands for "no span".
        places_BS = functional.pad(candidate_BM, (1, 0))
        return self.start(start_BH).gather(1, places_BS), self.end(end_BH).gather(1, places_BS)


class PointerSpanHead(nn.Module):
    """The mask's state as a learned query against the state of each token of u_j; "no span" has its own logit."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.start = nn.Linear(hidden_size, hidden_size)
        self.end = nn.Linear(hidden_size, hidden_size)
        self.no_start = nn.Linear(hidden_size, 1)
        self.no_end = nn.Linear(hidden_size, 1)

    def forward(
        self, start_BH: Tensor, end_BH: Tensor, tokens_BMH: Tensor, candidate_BM: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, S) of start and end; `tokens_BMH`: the states of u_j's tokens."""
        del candidate_BM
        scale = tokens_BMH.size(-1) ** -0.5  # as in attention: the product's variance does not grow with H
        start_BM = torch.einsum("bh,bmh->bm", self.start(start_BH), tokens_BMH) * scale
        end_BM = torch.einsum("bh,bmh->bm", self.end(end_BH), tokens_BMH) * scale
        return torch.cat((self.no_start(start_BH), start_BM), 1), torch.cat((self.no_end(end_BH), end_BM), 1)


class StudentModel(nn.Module):
    """Any AutoModelForMaskedLM encoder with its head at the masks, and the student's own heads (`heads`)."""

    def __init__(
        self,
        language_model: Any,
        answers: AnswerIds,
        *,
        span_head: SpanHeadName,
        max_prompt_tokens: int,
        outputs: Outputs = _DEFAULT_OUTPUTS,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.outputs = outputs
        self.num_emotions = len(answers.emotions)
        self.reads_vocabulary = False
        """Whether forward passes of a training give the logits of the whole vocabulary at mask_cau."""
        hidden_size = language_model.config.hidden_size
        self.span_head: PositionSpanHead | PointerSpanHead | None = None
        if outputs.spans:
            self.span_head = (
                PositionSpanHead(hidden_size, max_prompt_tokens)
                if span_head == "position"
                else PointerSpanHead(hidden_size)
            )
        self.classifier = nn.Linear(hidden_size, 2) if outputs.cause_by == "cls" else None
        self.priors: Priors | None = None
        if outputs.priors:
            self.priors = Priors(
                len(answers.emotions) if outputs.emotions else 0,
                len(answers.connectives) if outputs.cause_by == "connective" else 0,
                has_cause=outputs.cause_by != "none",
                has_spans=outputs.spans,
                has_later=outputs.later_candidates,
            )
        # Zeros, so that at first nothing but the priors decides.
        if self.priors is not None:
            for head in (self.span_head, self.classifier):
                for parameter in () if head is None else head.parameters():
                    nn.init.zeros_(parameter)
        for name, ids in (("emotion_ids", answers.emotions), ("connective_ids", answers.connectives)):
            # Buffers move with the model. They are not saved: the card's words give them again.
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long), persistent=False)
        self.emotion_ids: Tensor
        self.connective_ids: Tensor
        check_head(language_model)
        self.states = EncoderStates(language_model.base_model)

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The modules beside the language model, by name, which `heads.safetensors` holds."""
        found = {"span": self.span_head, "classifier": self.classifier, "priors": self.priors}
        return {name: module for name, module in found.items() if module is not None}

    def forward(self, batch: Batch) -> StudentOutput:
        """Logits at the masks for a batch of prompts."""
        embedded_RTH, answers_AH = self._embedded(batch.token_ids_RT)
        states_BPH = self.states(batch, embedded_RTH)
        return self.read(
            states_BPH, batch.candidate_BM, batch.candidate_mask_BM, batch.distance_B, answers_AH
        )

    def _embedded(self, token_ids_RT: Tensor) -> tuple[Tensor, Tensor | None]:
        """The word vectors of the tokens, and those of the answer words if the output embedding is tied to them.

        In one lookup: the gradient of each is as large as the vocabulary, so that three of them would be cleared and
        added up in each step.
        """
        embedding = self.language_model.get_input_embeddings()
        if self.language_model.get_output_embeddings().weight is not embedding.weight:
            return embedding(token_ids_RT), None
        found_NH = embedding(torch.cat((token_ids_RT.flatten(), self.emotion_ids, self.connective_ids)))
        tokens_NH, answers_AH = found_NH.split(
            (token_ids_RT.numel(), self.num_emotions + len(self.connective_ids))
        )
        return tokens_NH.unflatten(0, token_ids_RT.shape), answers_AH

    @torch.inference_mode()
    def logits(self, batch: Batch, device: torch.device, precision: str = "float32") -> Logits:
        """The logits of a batch as arrays, as a prediction sees them: without dropout."""
        was_training = self.training
        if was_training:
            self.eval()
        with autocast(device, precision):
            output: StudentOutput = self(batch.to(device))
        if was_training:
            self.train()
        return output.arrays()

    def read(
        self,
        states_BPH: Tensor,
        candidate_BM: Tensor,
        candidate_mask_BM: Tensor,
        distance_B: Tensor,
        answers_AH: Tensor | None = None,
    ) -> StudentOutput:
        """Logits from the states that some head reads of each pair.

        They are: the first token's (in a tree, those of the last of the branch, since the first is the same for all
        candidates), those of the four masks, those of u_j's tokens. `answers_AH` are the vectors of the answer words,
        emotions first, if the caller has looked them up.
        """
        first_BH, masks_B4H, tokens_BMH = states_BPH[:, 0], states_BPH[:, 1:5], states_BPH[:, 5:]
        emotion_BE, connective_BA = self._words(masks_B4H, answers_AH)
        vocabulary_BV = None
        if self.reads_vocabulary and self.training:
            vocabulary_BV = self.language_model.get_output_embeddings()(
                head_states(self.language_model, masks_B4H[:, 1])
            )
        start_BS, end_BS = self._spans(masks_B4H, tokens_BMH, candidate_BM, candidate_mask_BM, distance_B)
        classifier_B2 = None
        if self.classifier is not None:
            classifier_B2 = self.classifier(first_BH).float()
        if self.priors is not None:
            emotion_BE, connective_BA, classifier_B2 = self.priors.shifted(
                emotion_BE, connective_BA, classifier_B2, distance_B
            )
        return StudentOutput(emotion_BE, connective_BA, start_BS, end_BS, classifier_B2, vocabulary_BV)

    def _words(self, masks_B4H: Tensor, answers_AH: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, E) of the emotion words at mask_emo and (B, A) of the connectives at mask_cau, if predicted."""
        is_predicted = (self.outputs.emotions, self.outputs.cause_by == "connective")
        masks = [mask for mask in (0, 1) if is_predicted[mask]]
        if not masks:
            return None, None
        emotions_EH = connectives_AH = None
        if answers_AH is not None:
            emotions_EH, connectives_AH = answers_AH[: self.num_emotions], answers_AH[self.num_emotions :]
        # Both masks go through the head in one product.
        states = dict(
            zip(masks, head_states(self.language_model, masks_B4H[:, masks]).unbind(1), strict=True)
        )
        return (
            self._answer_logits(states[0], self.emotion_ids, emotions_EH) if 0 in states else None,
            self._answer_logits(states[1], self.connective_ids, connectives_AH) if 1 in states else None,
        )

    def _spans(
        self,
        masks_B4H: Tensor,
        tokens_BMH: Tensor,
        candidate_BM: Tensor,
        candidate_mask_BM: Tensor,
        distance_B: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        if self.span_head is None:
            return None, None
        start_BS, end_BS = self.span_head(masks_B4H[:, 2], masks_B4H[:, 3], tokens_BMH, candidate_BM)
        start_BS, end_BS = start_BS.float(), end_BS.float()
        if self.priors is not None:
            shifts = self.priors.span_shift(distance_B, candidate_mask_BM)
            start_BS, end_BS = start_BS + shifts[0], end_BS + shifts[1]
        absent_BS = functional.pad(~candidate_mask_BM, (1, 0))
        return start_BS.masked_fill(absent_BS, -torch.inf), end_BS.masked_fill(absent_BS, -torch.inf)

    def _answer_logits(self, states_BH: Tensor, ids_A: Tensor, words_AH: Tensor | None) -> Tensor:
        # Looked up in each step: the embedding is trained, so its rows change.
        decoder = self.language_model.get_output_embeddings()
        bias_A = None if decoder.bias is None else decoder.bias[ids_A]
        return functional.linear(states_BH, decoder.weight[ids_A] if words_AH is None else words_AH, bias_A)


class TorchScorer:
    """A student of PyTorch as a predictor reads it: encoded pairs in, logits out. Thread-safe."""

    def __init__(
        self, model: StudentModel, *, pad_id: int, device: torch.device, precision: str = "float32"
    ) -> None:
        self.model = model.to(device).eval()
        self._pad_id, self._device, self._precision = pad_id, device, precision

    def batches(self, encoded: Sequence[EncodedPair], max_tokens: int) -> Iterator[tuple[Ints, Logits]]:
        """The logits of all pairs, a batch at a time, each with the indices of its pairs."""
        lengths = np.array([len(pair.token_ids) for pair in encoded])
        for rows in batches_of_tokens(lengths, np.arange(len(encoded)), max_tokens, encoded_targets(encoded)):
            batch = encoded_batch([encoded[row] for row in rows], self._pad_id)
            yield rows, self.model.logits(batch, self._device, self._precision)


class EncoderStates:
    """The last layer's states of an encoder, at chosen places of each prompt only.

    A student reads a handful of places per prompt. Layers of BERT's build (RoBERTa, XLM-R, BERT and their kin) compute
    the last feed-forward there alone, which saves most of that layer. For others, and for an encoder that is compiled
    as a whole, the places are picked from all states.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self._in_thread = threading.local()  # a served student answers several requests at once
        self._is_narrow = False
        layers = getattr(getattr(encoder, "encoder", None), "layer", None)
        last: Any = None if layers is None else layers[-1]
        # The last layer's attention still reads all tokens, but its feed-forward works on each token by itself, so it
        # may run on the places alone. With `chunk_size_feed_forward` a base calls it for some tokens at a time: the
        # places would not be those of the prompt.
        if hasattr(last, "feed_forward_chunk") and not encoder.config.chunk_size_feed_forward:
            self._is_narrow = True
            self._all_places = last.feed_forward_chunk
            last.feed_forward_chunk = self._feed_forward

    def compile(self) -> None:
        """Compile the encoder with symbolic lengths: they differ from batch to batch."""
        # The compiler cannot trace values that belong to a thread.
        self._is_narrow = False
        self.encoder.compile(dynamic=True)

    def __call__(self, batch: Batch, embedded_RTH: Tensor) -> Tensor:
        """(B, P, H): the states at the places of each pair, which may repeat, from the word vectors of the tokens."""
        if batch.tree is None or batch.read_U is None or batch.places_BP is None:
            first_B1 = torch.zeros_like(batch.masks_B4[:, :1])
            places_BP = torch.cat((first_B1, batch.masks_B4, batch.candidate_BM), 1)
            return self.picked(
                partial(_at, places_BP=places_BP),
                inputs_embeds=embedded_RTH,
                attention_mask=batch.attention_RT,
            )
        inputs = tree_inputs(self.encoder, batch.tree)
        pick = partial(_at, places_BP=batch.read_U[None])
        (states_UH,) = self.picked(pick, inputs_embeds=embedded_RTH, **inputs)
        # The gradient of an embedding adds up what repeats in a fixed order, on a GPU, too.
        return functional.embedding(batch.places_BP, states_UH)

    def picked(self, pick: Callable[[Tensor], Tensor], **inputs: Any) -> Tensor:
        """What `pick` chooses of the states (R, T, H) that the encoder makes of its inputs; (…, H)."""
        if not self._is_narrow:
            return pick(self.encoder(**inputs)[0])
        self._in_thread.pick = pick
        try:
            return self.encoder(**inputs)[0]
        finally:
            # A later plain call in this thread, such as that of `check_trees`, must get the states of all tokens.
            self._in_thread.pick = None

    def _feed_forward(self, states_BTH: Tensor) -> Tensor:
        pick = getattr(self._in_thread, "pick", None) if self._is_narrow else None
        return self._all_places(states_BTH if pick is None else pick(states_BTH))


def _at(states_BTH: Tensor, places_BP: Tensor) -> Tensor:
    """(B, P, H): of each sequence its places."""
    index = places_BP.unsqueeze(-1).expand(-1, -1, states_BTH.size(-1))
    return torch.gather(states_BTH, 1, index)


def head_states(language_model: Any, states: Tensor) -> Tensor:
    """The language model's head up to the output embedding, at the given states (…, H).

    Raises ModelError for an architecture whose head is not known.
    """
    # Transformers has no common name for this part of a head. `check_head` compares the result with the whole model.
    if hasattr(getattr(language_model, "lm_head", None), "dense"):  # RoBERTa, MPNet, XLM-R
        head = language_model.lm_head
        return head.layer_norm(functional.gelu(head.dense(states)))
    if hasattr(language_model, "cls") and hasattr(language_model.cls, "predictions"):  # BERT and its kin
        return language_model.cls.predictions.transform(states)
    if hasattr(language_model, "vocab_transform"):  # DistilBERT
        hidden = language_model.activation(language_model.vocab_transform(states))
        return language_model.vocab_layer_norm(hidden)
    if hasattr(language_model, "head") and hasattr(language_model, "decoder"):  # ModernBERT
        return language_model.head(states)
    raise ModelError(
        f"{type(language_model).__name__}: the head of this architecture is not known here; "
        "choose a RoBERTa, XLM-R, MPNet, BERT, DistilBERT or ModernBERT base"
    )


def load_language_model(reference: str | Path, *, has_head: bool = False, logs: bool = True) -> Any:
    """The base as a masked language model in float32, from safetensors.

    A base may come without the language model's head, unless it `has_head`: the head is then new, which is logged.
    Raises ModelError, one line, where it cannot be loaded or lacks other weights.
    """
    model, missing = load_pretrained(AutoModelForMaskedLM, reference, "a masked language model")
    encoder = f"{model.base_model_prefix}."
    # The pooler serves sentence classification; no output of a student passes through it.
    lacking = [key for key in missing if not key.startswith(f"{encoder}pooler.")]
    needed = [key for key in lacking if has_head or key.startswith(encoder)]
    if needed:
        raise ModelError(
            f"{reference}: found no weights for {needed[0]} ({len(needed)} are missing), expected a whole "
            f"{'student' if has_head else 'encoder'}; fetch or save it again"
        )
    if lacking and logs:
        logger.warning(
            "%s: has no weights for the language model's head (%s): the head starts with random weights",
            reference,
            lacking[0],
        )
    return model


def student_answer_ids(
    tokenizer: Any, emotions: Sequence[str], stand_ins: Mapping[str, str] | None = None
) -> AnswerIds:
    """Token ids of the answer words at their places in the student's prompt. Raises ModelError if one splits."""
    # A config may list stand-ins for emotions that this corpus does not have.
    used = {word: stand_in for word, stand_in in (stand_ins or {}).items() if word in emotions}
    return AnswerIds(
        emotions=tuple(
            answer_token_ids(tokenizer, emotions, before="feels ", after=" and says", stand_ins=used)
        ),
        connectives=tuple(answer_token_ids(tokenizer, CONNECTIVES, before="so. ", after=" 1 says")),
    )


def longest_prompt(tokenizer: Any, language_model: Any, wanted: int) -> int:
    """The smallest of the wanted, the tokenizer's and the model's maximum number of tokens."""
    limits = [wanted]
    if 0 < tokenizer.model_max_length < 10**6:  # "no limit" is a huge number
        limits.append(tokenizer.model_max_length)
    positions = getattr(language_model.config, "max_position_embeddings", None)
    if positions:
        # RoBERTa's table of 514 rows serves 512 tokens, which count from the row after padding's.
        limits.append(positions - first_position(language_model.base_model))
    return min(limits)


def save_student(directory: Path, model: StudentModel, tokenizer: Any, card: StudentCard) -> None:
    """Write weights, tokenizer and card into a directory, without config, metrics and manifest."""
    save_pretrained([model.language_model, tokenizer], directory / MODEL_FOLDER)
    with atomic_path(directory / HEADS_NAME) as temporary:
        save_file(_head_tensors(model), temporary)
    write_json(directory / CARD_NAME, card.as_json())


def load_student(directory: Path) -> tuple[StudentModel, Any, StudentCard]:
    """Model (float32, on the CPU, in evaluation mode), tokenizer and card of a student directory.

    Raises ArtifactError for a card or heads that do not fit, ModelError where the weights cannot be loaded.
    """
    card = read_card(directory / CARD_NAME)
    folder = directory / MODEL_FOLDER
    tokenizer, language_model = load_tokenizer(folder), load_language_model(folder, has_head=True)
    # Settings that load may still not run, which a first prompt shows (`StudentModel`).
    with refusing(f"model {folder}: does not run as a student's"):
        model = StudentModel(
            language_model,
            student_answer_ids(tokenizer, card.emotions, card.stand_ins),
            span_head=card.span_head,
            max_prompt_tokens=card.max_prompt_tokens,
            outputs=card.outputs,
        )
    path = directory / HEADS_NAME
    try:
        _load_heads(model, load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{path}: does not hold the heads of this student ({reason}); train the student again"
        ) from None
    return model.eval(), tokenizer, card


def _head_tensors(model: StudentModel) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, head in model.heads.items()
        for key, tensor in head.state_dict().items()
    }


def _load_heads(model: StudentModel, tensors: dict[str, Tensor]) -> None:
    """Load the heads. Raises RuntimeError if a tensor is missing, unknown, or of another shape."""
    # Earlier versions also saved priors that the mode does not use.
    if model.priors is not None:
        own = model.priors.state_dict()
        unused = {f"priors.{name}" for name in PRIOR_NAMES if name not in own}
        tensors = {key: tensor for key, tensor in tensors.items() if key not in unused}
    # `load_state_dict` checks each head's own tensors, but sees no tensor of a head that this student lacks.
    if unknown := sorted(set(tensors) - set(_head_tensors(model))):
        raise RuntimeError(f"unexpected tensor {unknown[0]}")
    for name, head in model.heads.items():
        prefix = f"{name}."
        head.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})


def load_scorer(
    directory: Path, *, device: torch.device | str, precision: str
) -> tuple[TorchScorer, Any, StudentCard]:
    """Scorer, tokenizer and card of a student directory, on a device of torch or on auto, cpu or cuda."""
    if device in ("auto", "cpu", "cuda"):
        device = start_runtime(device=str(device)).device
    model, tokenizer, card = load_student(directory)
    scorer = TorchScorer(
        model, pad_id=tokenizer.pad_token_id or 0, device=torch.device(device), precision=precision
    )
    return scorer, tokenizer, card


def check_head(language_model: Any) -> None:
    """Compare the shortcut through the head with the whole model on one short input. Raises ModelError."""
    ids = torch.arange(8, device=language_model.device).unsqueeze(0) % language_model.config.vocab_size
    # In evaluation mode: dropout would make the two results differ.
    was_training = language_model.training
    language_model.eval()
    with torch.no_grad():
        hidden = language_model.base_model(input_ids=ids)[0]
        decoder = language_model.get_output_embeddings()
        found = functional.linear(head_states(language_model, hidden), decoder.weight, decoder.bias)
        expected = language_model(input_ids=ids).logits
    language_model.train(was_training)
    if not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
        raise ModelError(
            f"{type(language_model).__name__}: its head does not compute what is known of this architecture; "
            "choose a RoBERTa, XLM-R, MPNet, BERT, DistilBERT or ModernBERT base"
        )
