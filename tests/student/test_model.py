"""The student's network against the whole language model, head by head, for several architectures."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    RobertaForMaskedLM,
)

from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.errors import ModelError
from kdecs.models import load_tokenizer
from kdecs.student.data import encoded_batch
from kdecs.student.decision import best_spans, cause_scores
from kdecs.student.model import (
    AnswerIds,
    StudentModel,
    StudentOutput,
    load_language_model,
    longest_prompt,
    student_answer_ids,
)

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def architectures():
    torch.manual_seed(1)
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    return {
        "bert": BertForMaskedLM(BertConfig(**SMALL)),
        "mpnet": MPNetForMaskedLM(MPNetConfig(**SMALL)),
        "modernbert": ModernBertForMaskedLM(ModernBertConfig(**SMALL, **special)),
        "distilbert": DistilBertForMaskedLM(
            DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        ),
    }


@pytest.fixture(scope="module")
def batch(base, corpus_files):
    encoder = PairEncoder(AutoTokenizer.from_pretrained(base), 256)
    pairs = [p for d in read_corpus(corpus_files["valid"]).dialogues for p in pairs_of(d)][:6]
    return encoded_batch(list(encoder.encode(pairs)), pad_id=1)


def student_of(base, span_head: str) -> StudentModel:
    torch.manual_seed(0)
    answers = student_answer_ids(load_tokenizer(str(base)), ["neutral", "happiness", "anger"])
    model = StudentModel(load_language_model(base), answers, span_head=span_head, max_prompt_tokens=256)
    return model.eval()


def test_answer_logits_are_those_of_the_whole_model(base, batch):
    model = student_of(base, "pointer")
    output = model(batch)
    logits = (
        RobertaForMaskedLM.from_pretrained(base)
        .eval()(input_ids=batch.token_ids_RT, attention_mask=batch.attention_RT)
        .logits
    )
    rows = torch.arange(len(logits))
    emotion = logits[rows, batch.masks_B4[:, 0]][:, model.emotion_ids]
    connective = logits[rows, batch.masks_B4[:, 1]][:, model.connective_ids]
    torch.testing.assert_close(output.emotion_BE, emotion, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.connective_BA, connective, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert", "distilbert"])
def test_other_architectures_pass_the_check_of_their_head(name, batch):
    language_model = architectures()[name]
    model = StudentModel(
        language_model, AnswerIds((3, 4, 5), (6, 7, 8, 9, 10)), span_head="pointer", max_prompt_tokens=256
    )
    small = batch._replace(token_ids_RT=batch.token_ids_RT % 60)
    output = model(small)
    assert output.emotion_BE.shape == (6, 3)
    output.connective_BA.sum().backward()


@pytest.mark.parametrize("span_head", ["position", "pointer"])
def test_the_last_feed_forward_runs_where_states_are_read(base, batch, span_head):
    model = student_of(base, span_head)
    layers = model.language_model.base_model.encoder.layer
    seen = []
    for layer in layers:
        layer.intermediate.register_forward_hook(
            lambda module, inputs, output: seen.append(inputs[0].size(1))
        )
    narrow = model(batch)
    num_tokens, num_read = batch.token_ids_RT.size(1), 5 + batch.candidate_BM.size(1)
    assert num_read < num_tokens
    assert seen == [num_tokens] * (len(layers) - 1) + [num_read]
    model.states._is_narrow = False  # as after compiling: the places are taken from all states
    whole = model(batch)
    for found, expected in zip(narrow, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_base_that_computes_its_feed_forward_in_chunks_gives_the_same(base, batch, tmp_path):
    shutil.copytree(base, tmp_path / "chunked")
    path = tmp_path / "chunked" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chunk_size_feed_forward": 1}))
    found, expected = student_of(tmp_path / "chunked", "pointer")(batch), student_of(base, "pointer")(batch)
    torch.testing.assert_close(found.emotion_BE, expected.emotion_BE, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.start_BS, expected.start_BS, atol=1e-5, rtol=1e-5)


def test_threads_do_not_share_the_places_that_are_read(base, batch):
    model = student_of(base, "pointer")
    alone = [
        batch._replace(**{name: getattr(batch, name)[row : row + 1] for name in batch._fields[:6]})
        for row in range(len(batch.masks_B4))
    ]
    with torch.inference_mode():
        expected = [model(one).emotion_BE for one in alone]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: model(one).emotion_BE.detach(), alone * 20))
    for number, logits in enumerate(found):
        torch.testing.assert_close(logits, expected[number % len(alone)], atol=1e-5, rtol=1e-5)


def test_an_unknown_head_is_refused():
    language_model = ElectraForMaskedLM(ElectraConfig(**SMALL, embedding_size=16))
    with pytest.raises(ModelError, match=r"ElectraForMaskedLM.*choose"):
        StudentModel(language_model, AnswerIds((3,), (4, 5)), span_head="pointer", max_prompt_tokens=64)


def test_the_position_head_is_a_softmax_over_the_prompt_restricted_to_u_j(base, batch):
    """Eq. 8-9: the same probabilities as the softmax over all positions, renormalised over 0 and u_j's copy."""
    model = student_of(base, "position")
    output = model(batch)
    hidden = model.language_model.base_model(input_ids=batch.token_ids_RT, attention_mask=batch.attention_RT)[
        0
    ]
    for row in range(len(hidden)):
        full = torch.softmax(model.span_head.start(hidden[row, batch.masks_B4[row, 2]]), dim=-1)
        places = torch.cat(
            (torch.zeros(1, dtype=torch.long), batch.candidate_BM[row][batch.candidate_mask_BM[row]])
        )
        expected = full[places] / full[places].sum()
        found = torch.softmax(output.start_BS[row], dim=-1)
        torch.testing.assert_close(found[: len(places)], expected, atol=1e-5, rtol=1e-4)
        assert torch.all(found[len(places) :] == 0)


@pytest.mark.parametrize("span_head", ["position", "pointer"])
def test_every_parameter_but_unused_ones_gets_a_gradient(base, batch, span_head):
    model = student_of(base, span_head)
    output = model(batch)
    parts = [output.emotion_BE, output.connective_BA, output.start_BS[:, :2], output.end_BS[:, :2]]
    sum(part.square().sum() for part in parts).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_padding_changes_nothing(base, batch):
    model = student_of(base, "pointer")
    alone = model(batch._replace(**{name: getattr(batch, name)[:1] for name in batch._fields[:6]}))
    together = model(batch)
    torch.testing.assert_close(alone.emotion_BE, together.emotion_BE[:1], atol=1e-5, rtol=1e-5)


def test_best_spans_equal_a_search_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 40, 9, generator=generator)
    start[:, 7:], end[:, 7:] = -torch.inf, -torch.inf
    found = best_spans(start.numpy(), end.numpy())
    for row in range(40):
        pairs = [(a, b) for a in range(1, 9) for b in range(a, 9)]
        best = max(pairs, key=lambda pair: (start[row, pair[0]] + end[row, pair[1]]).item())
        assert tuple(found[row].tolist()) == best


def test_cause_score_by_hand():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.1, 0.2, 0.4]]))
    start, end = torch.log(torch.tensor([[0.9, 0.1]])), torch.log(torch.tensor([[0.4, 0.6]]))
    found = cause_scores(StudentOutput(torch.zeros(1, 2), logits, start, end).arrays())
    assert found.item() == pytest.approx((0.6 + 1 - 0.6) / 2, abs=1e-6)


def test_limits_of_the_prompt(base):
    tokenizer, language_model = load_tokenizer(str(base)), load_language_model(base)
    assert longest_prompt(tokenizer, language_model, 512) == 256  # 258 positions, RoBERTa starts at 2
    assert longest_prompt(tokenizer, language_model, 100) == 100


def test_an_emotion_that_splits_is_refused_and_a_stand_in_helps(base):
    tokenizer = load_tokenizer(str(base))
    with pytest.raises(ModelError, match=r"bewilderment.*stand_ins"):
        student_answer_ids(tokenizer, ["neutral", "bewilderment"])
    found = student_answer_ids(tokenizer, ["neutral", "bewilderment"], {"bewilderment": "surprise"})
    assert found.emotions[1] == student_answer_ids(tokenizer, ["surprise"]).emotions[0]


def test_a_base_may_lack_its_head_but_not_a_part_of_the_encoder(base, tmp_path, caplog):
    assert load_language_model(base) is not None and not caplog.records
    folders = {}
    for name, lost in (("headless", "lm_head."), ("part", "layer.1.attention"), ("other", "lm_head.dense")):
        folders[name] = tmp_path / name
        shutil.copytree(base, folders[name])
        kept = {k: t for k, t in load_file(base / "model.safetensors").items() if lost not in k}
        save_file(kept, folders[name] / "model.safetensors", metadata={"format": "pt"})
    load_language_model(folders["headless"], logs=False)
    assert not caplog.records
    load_language_model(folders["headless"])
    (record,) = caplog.records
    assert "no weights for the language model's head (lm_head." in record.getMessage()
    with pytest.raises(
        ModelError, match=r"no weights for roberta\.encoder\.layer\.1\.attention.*whole encoder"
    ):
        load_language_model(folders["part"])
    with pytest.raises(ModelError, match=r"no weights for lm_head\.dense.*whole student"):
        load_language_model(folders["other"], has_head=True)


def test_weights_of_another_shape_are_one_clear_line(base, tmp_path):
    shutil.copytree(base, tmp_path / "odd")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.dense.weight"] = torch.zeros(7, 7)
    save_file(weights, tmp_path / "odd" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded as a masked language model") as raised:
        load_language_model(tmp_path / "odd")
    assert "\n" not in str(raised.value)


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer .*: cannot be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match="cannot be loaded as a masked language model"):
        load_language_model(tmp_path)
