"""The predictor: whole dialogues in, decisions out; files, the served form, and damage."""

import copy
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
from support import change_json, rewrite_manifest

from kdecs.artifact import read_manifest, write_json
from kdecs.corpus.pairs import candidate_pairs, pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import NEUTRAL, Dialogue, Utterance
from kdecs.errors import ArtifactError, CorpusError, KdecsError, ModelError
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import read_predictions
from kdecs.student.commands import predict as predict_command
from kdecs.student.model import load_student
from kdecs.student.predict.predictor import Student
from kdecs.student.pyfunc import ServedStudent, _load_pyfunc


def dialogue_of(*texts: str) -> Dialogue:
    return Dialogue(
        "d", tuple(Utterance(n, "AB"[n % 2], text, None, None) for n, text in enumerate(texts, start=1))
    )


def test_predictions_of_validation_score_as_training_said(directory, student, corpus_files):
    corpus = read_corpus(corpus_files["valid"])
    scores = evaluate(corpus, student.predict_pairs(corpus))
    noted = read_manifest(directory).details["valid"]
    assert scores.missing == 0
    for key, value in scores.values.items():
        assert value == pytest.approx(noted[key], abs=1e-6)


def test_every_pair_has_a_decision_that_fits_the_others(student):
    dialogues = read_corpus(bundled_sample("test")).dialogues[:3]
    found = student.predict(dialogues)
    pairs = [pair for dialogue in dialogues for pair in candidate_pairs(dialogue)]
    assert [p.key for p in found] == [(pair.dialogue.id, pair.target, pair.candidate) for pair in pairs]
    emotions = {}
    for prediction, pair in zip(found, pairs, strict=True):
        assert emotions.setdefault((pair.dialogue.id, pair.target), prediction.emotion) == prediction.emotion
        text = pair.dialogue.utterances[pair.candidate - 1].text
        assert prediction.span in text
        assert prediction.is_cause == bool(prediction.span)
        assert not (prediction.is_cause and prediction.emotion == NEUTRAL)


def test_batch_size_and_company_do_not_matter(student):
    dialogues = read_corpus(bundled_sample("test")).dialogues[:4]
    together = student.predict(dialogues)
    alone = [p for dialogue in dialogues for p in student.predict([dialogue], batch_tokens=64)]
    assert together == alone


def test_two_dialogues_of_one_id_share_nothing(student):
    """Each is predicted as it is alone, in Python and in a request, though their pairs have the same keys."""
    dialogues = read_corpus(bundled_sample("test")).dialogues
    alone = {dialogue.id: student.predict([dialogue]) for dialogue in dialogues}
    emotions = [[p.emotion for p in alone[dialogue.id]] for dialogue in dialogues]
    first, second = next(
        (a, b)
        for a, b in itertools.combinations(range(len(dialogues)), 2)
        if len(emotions[a]) == len(emotions[b]) and emotions[a] != emotions[b]
    )
    twins = [replace(dialogues[number], id="same") for number in (first, second)]
    found = student.predict(twins)
    assert [p.emotion for p in found] == emotions[first] + emotions[second]
    rows = [{"id": "same", "utterances": [_raw(u) for u in twin.utterances]} for twin in twins]
    answers = [json.loads(text) for text in ServedStudent(student).predict(rows)]
    assert [[row["emotion"] for row in answer] for answer in answers] == [emotions[first], emotions[second]]


def test_ranges_are_the_spans(eager):
    dialogue = read_corpus(bundled_sample("test")).dialogues[0]
    pairs = pairs_of(dialogue, "all")
    for found, pair in zip(eager.detail(pairs), pairs, strict=True):
        assert found.span_range is not None
        start, end = found.span_range
        assert dialogue.utterances[pair.candidate - 1].text[start:end] == found.prediction.span != ""
        assert 0 <= found.score <= 1


def test_a_score_below_the_threshold_is_no_cause(eager):
    pairs = pairs_of(read_corpus(bundled_sample("test")).dialogues[0], "all")
    scores = sorted(found.score for found in eager.detail(pairs))
    card = eager.card.model_copy(update={"threshold": scores[5]})
    picky = copy.copy(eager)
    picky.card = card
    assert sum(found.prediction.is_cause for found in picky.detail(pairs)) == len(pairs) - 5


@pytest.mark.parametrize(
    "texts",
    [
        ("Hi .",),
        ("😀😀", "👩‍👩‍👧 !"),
        ("你好", "très bien , ça va"),
        ("one <mask> two", "</s>"),
        ("long " * 400, "so !"),
    ],
)
def test_unusual_dialogues_work(student, texts):
    found = student.predict([dialogue_of(*texts)])
    assert len(found) == len(texts) * (len(texts) + 1) // 2


def test_no_dialogue_gives_no_prediction(student):
    assert student.predict([]) == []


def test_max_distance_bounds_the_candidates(student):
    found = student.predict([dialogue_of(*["Good news !"] * 12)], max_distance=2)
    assert len(found) == 1 + 2 + 3 * 10
    assert max(p.target - p.candidate for p in found) == 2


def test_the_command_writes_predictions_that_evaluate_reads(directory, tmp_path, capsys):
    output = tmp_path / "predictions.jsonl"
    predict_command(directory, bundled_sample("unlabelled"), output, device="cpu")
    shown = capsys.readouterr().out
    corpus = read_corpus(bundled_sample("unlabelled"), labelled=False)
    found = read_predictions(output, corpus)
    assert len(found) == sum(len(candidate_pairs(d)) for d in corpus.dialogues)
    assert f"{len(found)} pairs of {len(corpus.dialogues)} dialogues" in shown
    assert "dialogue " in shown


def test_a_faulty_file_is_refused_before_any_work(directory, tmp_path):
    lines = [json.dumps({"id": "a", "utterances": [{"turn": 1, "speaker": "A", "utterance": "Hi"}]}), "{"]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(CorpusError):
        predict_command(directory, path, tmp_path / "out.jsonl", device="cpu")
    assert not (tmp_path / "out.jsonl").exists()


def test_the_served_form_takes_frames_lists_and_texts(directory, student):
    served = _load_pyfunc(str(directory))
    dialogue = {
        "id": "x",
        "utterances": [{"speaker": "A", "utterance": "We won !"}, {"speaker": "B", "utterance": "Great !"}],
    }
    frame = pandas.DataFrame({"dialogue": [json.dumps(dialogue)]})
    answers = served.predict(frame)
    assert answers == served.predict([dialogue]) == served.predict(json.dumps(dialogue))
    rows = json.loads(answers[0])
    assert [(row["target"], row["candidate"]) for row in rows] == [(1, 1), (2, 1), (2, 2)]
    assert len(json.loads(served.predict([dialogue], {"max_distance": 0})[0])) == 2
    with pytest.raises(CorpusError, match="expected a column `dialogue`"):
        served.predict(pandas.DataFrame({"text": ["x"]}))
    with pytest.raises(CorpusError, match="row 1: not JSON"):
        served.predict([dialogue, "{"])
    with pytest.raises(CorpusError, match="utterance"):
        served.predict([{"utterances": [{"speaker": "A"}]}])


def _raw(utterance: Utterance) -> dict[str, object]:
    return {"turn": utterance.turn, "speaker": utterance.speaker, "utterance": utterance.text}


def copied(directory: Path, target: Path) -> Path:
    for path in directory.rglob("*"):
        if path.is_file():
            file = target / path.relative_to(directory)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("manifest.json", "no manifest.json"),
        ("model/model.safetensors", "missing"),
        ("heads.safetensors", "missing"),
    ],
)
def test_a_missing_file_is_one_clear_line(directory, tmp_path, file, message):
    twin = copied(directory, tmp_path / "copy")
    (twin / file).unlink()
    with pytest.raises(ArtifactError, match=message):
        Student.from_pretrained(twin)


def test_a_card_of_another_template_or_heads_of_garbage_are_refused(directory, tmp_path):
    twin = copied(directory, tmp_path / "copy")
    heads = twin / "heads.safetensors"
    heads.write_bytes(b"\xff" * heads.stat().st_size)
    with pytest.raises(ArtifactError, match="the file is damaged"):
        Student.from_pretrained(twin)
    other = copied(directory, tmp_path / "other")
    card = json.loads((other / "student.json").read_text())
    write_json(other / "student.json", {**card, "prompt_version": 9})
    with pytest.raises(ArtifactError, match=r"trained with prompt version 9"):
        load_student(other)


def test_prediction_needs_neither_pyarrow_nor_the_training_stack():
    code = (
        "import sys, kdecs.student.commands, kdecs.student.pyfunc\n"
        "heavy = {'pyarrow', 'ray', 'mlflow', 'deepspeed', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_command_module_loads_without_torch():
    code = "import sys, kdecs.student.commands, kdecs.student.config\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_student_from_anybody_runs_no_code_and_reads_no_other_file(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a forged manifest or without, and with a yes to whatever is asked."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w').close()"
    auto_map = {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "someone/models--own.Model"}

    def forged(name: str, files: dict[str, str], *, is_listed: bool, **config: object) -> Path:
        student = Path(shutil.copytree(directory, tmp_path / name))
        for path, text in files.items():
            (student / path).write_text(text)
        change_json(student / "model" / "config.json", **config)
        rewrite_manifest(student, *(files if is_listed else ()))
        return student

    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/nowhere"})
    for number, (files, is_listed, config, message) in enumerate(
        (
            ({"model/own.py": code}, True, {"auto_map": auto_map, "model_type": "own"}, "Python code"),
            ({"model/own.py": code}, True, {"auto_map": auto_map}, "Python code"),
            ({"model/own.py": code}, False, {"auto_map": auto_map}, "does not list this file"),
            ({}, True, {"auto_map": auto_map}, "Python code"),
            ({"model/adapter_config.json": adapter}, True, {}, "holds an adapter"),
            ({"model/adapter_config.json": adapter}, False, {}, "does not list this file"),
            ({"model/model.safetensors.index.json": "{}"}, False, {}, "does not list this file"),
            ({"model/.metadata": "x"}, False, {}, "does not list this file"),
            ({}, True, {"return_dict": False}, "does not run as a student's"),
            ({}, True, {"chunk_size_feed_forward": "x"}, "does not run as a student's"),
            ({}, True, {"hidden_size": "x"}, "cannot be loaded"),
            ({}, True, {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        )
    ):
        with pytest.raises(KdecsError, match=message) as caught:
            Student.from_pretrained(forged(str(number), files, is_listed=is_listed, **config))
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_student_s_config_does_not_choose_its_attention(
    directory: Path, student: Student, tmp_path: Path
) -> None:
    dialogues = read_corpus(bundled_sample("test")).dialogues[:1]
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    change_json(copy / "model" / "config.json", attn_implementation="kernels-community/flash-attn2")
    rewrite_manifest(copy)
    assert Student.from_pretrained(copy).predict(dialogues) == student.predict(dialogues)


def test_a_text_that_the_tokenizer_fails_at_is_one_line(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """What a panic of Rust code arrives as."""

    def panic(pairs: object) -> None:
        raise PanicException("retry-limit-in-match over\nstack")

    monkeypatch.setattr(student.encoder, "encode", panic)
    with pytest.raises(ModelError, match=r"pair .*: the tokenizer fails: retry-limit-in-match over$"):
        student.predict([dialogue_of("Hello!", "Hi.")])
