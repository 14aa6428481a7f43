"""Students of every encoder family, each with its own kind of tokenizer, from training to prediction."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
)

from kdecs.artifact import read_manifest
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.pairs import candidate_pairs
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import COARSE_EMOTIONS, FINE_EMOTIONS, Dialogue, Utterance
from kdecs.errors import ModelError
from kdecs.evaluation.metrics import evaluate
from kdecs.student.model import load_language_model, load_tokenizer, student_answer_ids
from kdecs.student.predict.predictor import Student
from kdecs.student.training import train_student

WORDS = sorted({*CONNECTIVES, *COARSE_EMOTIONS, *FINE_EMOTIONS})
FAMILIES = ("bert", "mpnet", "modernbert", "xlm-r")
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def lines() -> list[str]:
    texts = [u.text for d in read_corpus(bundled_sample("train")).dialogues for u in d.utterances]
    return [*texts, *[" " + " ".join(WORDS)] * 300]


def special_tokens(family: str) -> dict[str, str]:
    if family in ("bert", "modernbert"):
        return {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return {**names, "bos_token": "<s>", "eos_token": "</s>"}


def trained_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """WordPiece (BERT, MPNet), byte-level BPE (ModernBERT) or Unigram with Metaspace (XLM-R), of 900 tokens."""
    special = special_tokens(family)
    mask = "[MASK]" if family in ("bert", "modernbert") else "<mask>"
    names = [*dict.fromkeys(special.values()), mask]
    options = {"vocab_size": 900, "special_tokens": names, "show_progress": False}
    if family in ("bert", "mpnet"):
        tokenizer = Tokenizer(models.WordPiece(unk_token=special["unk_token"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    elif family == "modernbert":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**options, unk_token=special["unk_token"])
    tokenizer.train_from_iterator(lines(), trainer)
    if family == "xlm-r":  # its trainer keeps no rare words: they are given a place, as in a large vocabulary
        trained = json.loads(tokenizer.to_str())["model"]
        pieces = [(piece, score) for piece, score in trained["vocab"] if piece.strip("▁") not in WORDS]
        pieces += [(f"▁{word}", -4.0) for word in WORDS]
        tokenizer.model = models.Unigram(pieces, unk_id=trained["unk_id"])
    first, last = special["cls_token"], special["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (first, last)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token=AddedToken(mask, lstrip=family != "bert", special=True),
        model_max_length=256,
        **special,
    )


def config_of(family: str, tokenizer: PreTrainedTokenizerFast):
    known = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        **SIZE,
    }
    if family == "bert":
        return BertConfig(**known, max_position_embeddings=256)
    if family == "modernbert":
        ends = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        return ModernBertConfig(**known, **ends, max_position_embeddings=256)
    positions = 256 + tokenizer.pad_token_id + 1  # both count positions from the padding's id on
    return (MPNetConfig if family == "mpnet" else XLMRobertaConfig)(
        **known, max_position_embeddings=positions
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family_base(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    tokenizer = trained_tokenizer(request.param)
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config_of(request.param, tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_student_of_the_family_trains_and_predicts_as_it_was_validated(family_base, make_config, runtime):
    config = make_config(
        model={"base": str(family_base), "span_head": "pointer", "max_prompt_tokens": 256},
        corpus={"train": str(bundled_sample("valid")), "valid": str(bundled_sample("valid"))}
        | {"train_share": 0.15},
        distillation={"mode": "joint"},
        optimization={"learning_rate": 3e-3, "epochs": 2},
    )
    directory = train_student(config, runtime)
    details = read_manifest(directory, "student").details
    corpus = read_corpus(config.corpus.valid)
    student = Student.from_pretrained(directory)
    predictions = student.predict_pairs(corpus)
    scores = evaluate(corpus, predictions, universe="fold1")
    for key in ("macro_f1", "exact_match", "emotion_accuracy"):
        assert scores[key] == pytest.approx(details["valid"][key]), key
    for dialogue in corpus.dialogues[:3]:
        for target in range(1, len(dialogue.utterances) + 1):
            for candidate in range(1, target + 1):
                found = predictions.get((dialogue.id, target, candidate))
                assert found is None or found.span in dialogue.utterances[candidate - 1].text


def test_words_are_single_tokens_of_the_family_or_refused(family_base):
    tokenizer = load_tokenizer(str(family_base))
    answers = student_answer_ids(tokenizer, ["neutral", "happiness"])
    found = tokenizer.convert_ids_to_tokens(list(answers.emotions))
    assert [token.strip("▁Ġ") for token in found] == ["neutral", "happiness"]
    with pytest.raises(ModelError, match="not one token each: flabbergasted"):
        student_answer_ids(tokenizer, ["neutral", "flabbergasted"])
    assert load_language_model(family_base).config.hidden_size == 32


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_utterance_without_a_token_is_named(family):
    """BERT's normalizer drops format characters: such an utterance has nothing to point at."""
    texts = ("Hi .", "\u200b\ufe0f", "We won !")
    dialogue = Dialogue("d", tuple(Utterance(n, "A", text, None, None) for n, text in enumerate(texts, 1)))
    encoder = PairEncoder(trained_tokenizer(family), 256)
    message = r"dialogue d, turn 2: the tokenizer gives no token for the text '\\u200b\\ufe0f'"
    with pytest.raises(ModelError, match=message):
        list(encoder.encode(candidate_pairs(dialogue)))
