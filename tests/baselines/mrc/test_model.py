"""The reader's scores and loss against Transformers' own head and slow loops; padding changes nothing."""

import itertools
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from kdecs.baselines.mrc.model import answer_logits, answer_loss, answers, load_reader, question_batch
from kdecs.baselines.mrc.questions import QuestionEncoder
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import ModelError


@pytest.fixture(scope="module")
def reader(base):
    return load_reader(base).eval()


@pytest.fixture(scope="module")
def encoded(base):
    pairs = pairs_of(read_corpus(bundled_sample("valid")).dialogues[0])[:9]
    return list(QuestionEncoder(AutoTokenizer.from_pretrained(base), 256).encode(pairs))


def test_logits_are_those_of_a_question_alone(reader, encoded):
    with torch.no_grad():
        start_BT, end_BT = answer_logits(reader, question_batch(encoded, pad_id=0))
        for row, question in enumerate(encoded):
            alone = reader(
                input_ids=torch.from_numpy(question.token_ids[None].astype("int64")),
                token_type_ids=torch.from_numpy(question.type_ids[None].astype("int64")),
            )
            for ours, theirs in ((start_BT, alone.start_logits), (end_BT, alone.end_logits)):
                may = [0, *question.answerable.nonzero()[0]]
                torch.testing.assert_close(ours[row, may], theirs[0, may], atol=1e-5, rtol=1e-5)
                assert torch.isfinite(ours[row]).sum() == len(may)


def test_the_loss_is_that_of_squad(reader, encoded):
    """With every token open to answers it is what BertForQuestionAnswering computes."""
    batch = question_batch(encoded, pad_id=0)
    with torch.no_grad():
        output = reader(
            input_ids=batch.token_ids_BT,
            token_type_ids=batch.type_ids_BT,
            attention_mask=batch.attention_BT.long(),
            start_positions=batch.start_B,
            end_positions=batch.end_B,
        )
        found = answer_loss(output.start_logits, output.end_logits, batch.start_B, batch.end_B)
    torch.testing.assert_close(found.mean, output.loss)


def test_an_unknown_answer_has_no_part_in_the_loss():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    some, known = torch.tensor([1, -1, 0]), torch.tensor([1, 0])
    found = answer_loss(logits, logits, some, some).mean
    torch.testing.assert_close(found, answer_loss(logits[[0, 2]], logits[[0, 2]], known, known).mean)


def test_the_best_answer_and_its_score_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    start, end = torch.randn(6, 9, generator=generator), torch.randn(6, 9, generator=generator)
    start[:, 7:], end[:, 7:] = -math.inf, -math.inf
    scores, spans = answers(start, end)
    for row in range(6):
        pairs = [(a, b) for a, b in itertools.combinations_with_replacement(range(1, 9), 2)]
        best = max(pairs, key=lambda pair: float(start[row, pair[0]] + end[row, pair[1]]))
        assert tuple(spans[row].tolist()) == best
        margin = float(start[row, best[0]] + end[row, best[1]] - start[row, 0] - end[row, 0])
        assert float(scores[row]) == pytest.approx(1 / (1 + math.exp(-margin)), abs=1e-6)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded as a question-answering model"):
        load_reader(tmp_path)


def test_an_encoder_in_parts_or_a_product_without_its_head_is_refused(base, tmp_path):
    with pytest.raises(ModelError, match=r"no weights for qa_outputs"):
        load_reader(base, has_head=True)
    shutil.copytree(base, tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1.attention" not in name}
    save_file(kept, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for bert.encoder.layer.1.attention"):
        load_reader(tmp_path / "part")
