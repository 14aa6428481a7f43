"""Students of every encoder family, each with its own kind of tokenizer, from training to prediction."""

from pathlib import Path

import pytest
from support import made_once, save_tiny_encoder, tiny_tokenizer

from kdecs.artifact import read_manifest
from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.pairs import candidate_pairs
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.errors import ModelError
from kdecs.evaluation.metrics import evaluate
from kdecs.models import load_tokenizer
from kdecs.student.model import load_language_model, student_answer_ids
from kdecs.student.predict.predictor import Student
from kdecs.student.training import train_student

FAMILIES = ("bert", "mpnet", "modernbert", "xlm-roberta")


@pytest.fixture(scope="module", params=FAMILIES)
def family_base(request, tmp_path_factory) -> Path:
    kind = request.param
    return made_once(tmp_path_factory, f"student-{kind}", lambda path: save_tiny_encoder(path, kind))


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
    with pytest.raises(ModelError, match="words of several tokens: flabbergasted"):
        student_answer_ids(tokenizer, ["neutral", "flabbergasted"])
    assert load_language_model(family_base).config.hidden_size == 32


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_utterance_without_a_token_is_named(family):
    """BERT's normalizer drops format characters: such an utterance has nothing to point at."""
    texts = ("Hi .", "\u200b\ufe0f", "We won !")
    dialogue = Dialogue("d", tuple(Utterance(n, "A", text, None, None) for n, text in enumerate(texts, 1)))
    encoder = PairEncoder(tiny_tokenizer(family), 256)
    message = r"dialogue d, turn 2: the tokenizer has no token for the text '\\u200b\\ufe0f'"
    with pytest.raises(ModelError, match=message):
        list(encoder.encode(candidate_pairs(dialogue)))
