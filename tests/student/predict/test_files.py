"""`kdecs predict`: files and streams in and out, offsets, warnings, bounded memory, refusals that lose nothing."""

import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from kdecs.cli import app
from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.pairs import candidate_pairs
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.errors import CorpusError, DialogueError, OutputError
from kdecs.evaluation.predictions import Prediction, read_predictions
from kdecs.student.commands import predict
from kdecs.student.predict import files as prediction_files
from kdecs.student.predict.streaming import PairPrediction, num_candidates, stream
from kdecs.student.pyfunc import ServedStudent


class Echo:
    """Predicts "no cause" at once, and notes how many pairs it is given at a time."""

    def __init__(self) -> None:
        self.groups: list[int] = []

    def detail(self, pairs, *, batch_tokens=8192, on_batch=None):
        del batch_tokens, on_batch
        self.groups.append(len(pairs))
        return [
            PairPrediction(Prediction(p.dialogue.id, p.target, p.candidate, "neutral", False, ""), 0.1, None)
            for p in pairs
        ]


def dialogue_of(name: str, num_utterances: int) -> Dialogue:
    turns = (Utterance(n, "AB"[n % 2], f"turn {n} .", None, None) for n in range(1, num_utterances + 1))
    return Dialogue(name, tuple(turns))


def line_of(dialogue: Dialogue) -> str:
    utterances = [{"turn": u.turn, "speaker": u.speaker, "utterance": u.text} for u in dialogue.utterances]
    return json.dumps({"id": dialogue.id, "utterances": utterances}) + "\n"


@pytest.mark.parametrize("distance", [None, 0, 1, 3, 6, 7, 50])
@pytest.mark.parametrize("num_utterances", [1, 2, 7])
def test_the_number_of_candidates_is_counted_without_making_them(num_utterances, distance):
    made = candidate_pairs(dialogue_of("d", num_utterances), max_distance=distance)
    assert num_candidates(num_utterances, distance) == len(made)


def test_a_stream_keeps_order_and_reads_a_group_ahead():
    taken = []

    def dialogues():
        for number in range(60):
            taken.append(number)
            yield dialogue_of(str(number), 9)

    echo = Echo()
    for number, (dialogue, found) in enumerate(stream(echo, dialogues())):
        assert dialogue.id == str(number)
        keys = [item.prediction.key for item in found]
        assert keys == [(dialogue.id, p.target, p.candidate) for p in candidate_pairs(dialogue)]
        assert taken[-1] - number <= 1024 // 45 + 1
    assert sum(echo.groups) == 60 * 45
    assert max(echo.groups) < 1024 + 45


def test_memory_does_not_grow_with_the_number_of_dialogues():
    def peak(num_dialogues: int) -> int:
        tracemalloc.start()
        for _ in stream(Echo(), (dialogue_of(str(n), 8) for n in range(num_dialogues))):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(1500) < 2 * peak(150)


def test_a_long_dialogue_is_encoded_within_its_reach(base, monkeypatch):
    """The prompts are those of the whole history; the history that is tokenised is bounded."""
    words = ["we won", "très bien", "你好", "😀 !", "so", "a long story about nothing at all ,"]
    texts = [" ".join(words[(n * k) % 6] for k in range(1, 1 + n % 7 + 1)) for n in range(1, 161)]
    dialogue = Dialogue("d", tuple(Utterance(n, "A", t, None, None) for n, t in enumerate(texts, start=1)))
    tokenizer = AutoTokenizer.from_pretrained(base)
    pairs = candidate_pairs(dialogue, max_distance=200)[-160::23]
    windowed = PairEncoder(tokenizer, 96)
    first = windowed._window.first_turn(dialogue, 160)
    found = list(windowed.encode(pairs))
    monkeypatch.setattr("kdecs.corpus.encoding._LONG_CHARACTERS_PER_TOKEN", 10**9)
    assert found == list(PairEncoder(tokenizer, 96).encode(pairs))
    tokens = len(tokenizer(texts[first - 1 : 159], add_special_tokens=False)["input_ids"])
    assert first > 100 and tokens < 60


def test_a_long_dialogue_is_bounded_by_the_distance(directory, tmp_path, capsys):
    path, output = tmp_path / "long.jsonl", tmp_path / "out.jsonl"
    path.write_text(line_of(dialogue_of("long", 150)))
    predict(directory, path, output, max_distance=1, device="cpu", example=False)
    shown = capsys.readouterr()
    assert "dialogue long has 150 utterances: --max-distance 1 leaves 299 of its 11325 pairs" in shown.err
    assert "299 pairs of 1 dialogues" in shown.out
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["target"], r["candidate"]) for r in rows[:4]] == [(1, 1), (2, 1), (2, 2), (3, 2)]


def test_without_a_distance_the_warning_names_it(monkeypatch, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(line_of(dialogue_of(f"long {n}", 101)) for n in range(5)))
    request = prediction_files.FileRequest(path, None, has_example=False)
    echo = Echo()
    prediction_files.predict_file(request, lambda runtime: echo, device="cpu")
    err = capsys.readouterr().err
    assert "all 5151 pairs are predicted; set --max-distance N to predict fewer" in err
    assert err.count("--max-distance") == 3 and "5 dialogues in all" in err
    assert sum(echo.groups) == 5 * 5151


def test_a_long_dialogue_of_standard_input_python_or_a_request_is_warned_of(
    student, monkeypatch, capsys, recwarn, caplog
):
    long, short = dialogue_of("long", 101), dialogue_of("short", 100)
    text = line_of(long) + line_of(short)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    request = prediction_files.FileRequest(Path("-"), None, max_distance=0, has_example=False)
    prediction_files.predict_file(request, lambda runtime: Echo(), device="cpu")
    line = "dialogue long has 101 utterances: {} 0 leaves 101 of its 5151 pairs"
    err = capsys.readouterr().err
    assert err.count("warning") == 1
    assert "standard input: " + line.format("--max-distance") in err
    assert not recwarn
    student.predict([long, short], max_distance=0)
    assert [str(found.message) for found in recwarn] == [line.format("max_distance")]
    caplog.clear()
    ServedStudent(student).predict([json.loads(line_of(d)) for d in (long, short)], {"max_distance": 0})
    assert [record.getMessage() for record in caplog.records] == [line.format("max_distance")]
    assert len(recwarn) == 1


def test_offsets_stand_beside_the_contract_and_evaluate_reads_the_file(directory, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    predict(directory, bundled_sample("test"), output, device="cpu", offsets=True, max_distance=1)
    corpus = read_corpus(bundled_sample("test"))
    texts = {d.id: [u.text for u in d.utterances] for d in corpus.dialogues}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row in rows:
        text = texts[row["dialogue_id"]][row["candidate"] - 1]
        start, end = row["span_start"], row["span_end"]
        assert (start is None) == (end is None) == (not row["is_cause"])
        assert row["span"] == ("" if start is None else text[start:end])
        assert 0 <= row["score"] <= 1
    assert any(row["is_cause"] for row in rows)
    assert len(read_predictions(output, corpus)) == len(rows)
    scored = CliRunner().invoke(
        app,
        ["evaluate", "--corpus", str(bundled_sample("test")), "--predictions", str(output), "--json"],
        catch_exceptions=False,
    )
    assert scored.exit_code == 0 and "positive_f1" in scored.output


def test_standard_streams(directory, student, monkeypatch, capsys):
    dialogues = [dialogue_of("a", 2), dialogue_of("b", 3)]
    text = line_of(dialogues[0]) + "\n" + line_of(dialogues[1])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    predict(directory, Path("-"), Path("-"), device="cpu")
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.splitlines()]
    expected = student.predict(dialogues)
    assert [Prediction(**row) for row in rows] == expected
    assert "9 pairs of 2 dialogues" in shown.err


def test_a_faulty_line_of_standard_input_is_named(directory, monkeypatch):
    text = line_of(dialogue_of("a", 2)) + '{"utterances": [{"speaker": "A"}]}\n'
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    with pytest.raises(
        CorpusError, match=r"standard input, line 2, dialogue line 2, turn 1, field utterance"
    ):
        predict(directory, Path("-"), Path("-"), device="cpu")


def test_a_second_dialogue_of_an_id_is_refused_on_standard_input_as_in_a_file(
    directory, monkeypatch, tmp_path
):
    text = line_of(dialogue_of("a", 2)) + line_of(dialogue_of("b", 1)) + line_of(dialogue_of("a", 3))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    for path, place in ((Path("-"), "standard input, line 3"), (tmp_path / "in.jsonl", r"in\.jsonl")):
        (tmp_path / "in.jsonl").write_text(text)
        with pytest.raises(CorpusError, match=f"{place}, dialogue a, field id: .*second dialogue of this id"):
            predict(directory, path, tmp_path / "out.jsonl", device="cpu")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_dialogue_that_the_student_cannot_read_costs_that_dialogue(
    directory, student, tmp_path, monkeypatch, capsys, is_stream
):
    good = [dialogue_of("a", 3), dialogue_of("b", 2)]
    unfit = dialogue_of("unfit", 2)
    unfit = replace(
        unfit, utterances=(replace(unfit.utterances[0], speaker="Wolfeschlegel " * 60), unfit.utterances[1])
    )
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(map(line_of, (good[0], unfit, good[1]))))
    if is_stream:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    with pytest.raises(
        DialogueError, match=r"1 of 3 dialogues left out.*the others are complete.*pair unfit/1/1"
    ):
        predict(directory, Path("-") if is_stream else path, output, device="cpu", example=False)
    found = [Prediction(**json.loads(line)) for line in output.read_text().splitlines()]
    assert found == student.predict(good)
    shown = capsys.readouterr()
    assert "9 pairs of 2 dialogues" in shown.out and shown.err.count("left out") == 1
    # `kdecs predict` has no option for the length of a prompt.
    assert (
        "shorten the speakers' names, or train with a larger model.max_prompt_tokens; left out" in shown.err
    )
    with pytest.raises(DialogueError):
        student.predict([good[0], unfit])


class EchoCauses(Echo):
    """Predicts that the target itself is a cause, and joy for all."""

    def detail(self, pairs, *, batch_tokens=8192, on_batch=None):
        return [
            PairPrediction(
                Prediction(
                    p.dialogue.id, p.target, p.candidate, "happiness", p.target == p.candidate, "turn"
                ),
                0.9,
                None,
            )
            for p in pairs
        ]


def test_submissions_of_both_subtasks_are_written_and_can_be_scored(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("A: turn 1 .\nB: turn 2 .\n\nA: turn 1 .\n")
    request = prediction_files.FileRequest(path, tmp_path / "out", format="semeval", has_example=False)
    prediction_files.predict_file(request, lambda device: EchoCauses())
    found = [json.loads((tmp_path / "out" / f"Subtask_{n}_pred.json").read_text()) for n in (1, 2)]
    pairs = [[c["emotion-cause_pairs"] for c in document] for document in found]
    assert pairs[0] == [[["1_joy", "1_0_1"], ["2_joy", "2_0_1"]], [["1_joy", "1_0_1"]]]
    assert pairs[1] == [[["1_joy", "1"], ["2_joy", "2"]], [["1_joy", "1"]]]
    assert [c["conversation_ID"] for c in found[0]] == [1, 2]
    assert found[0][1]["conversation"] == [
        {"utterance_ID": 1, "text": "turn 1 .", "speaker": "A", "emotion": "joy"}
    ]
    for name, subtask in (("mine.json", 1), ("my_Subtask_2.json", 2)):
        one = replace(request, output=tmp_path / name)
        prediction_files.predict_file(one, lambda device: EchoCauses())
        assert json.loads((tmp_path / name).read_text()) == found[subtask - 1]
    with pytest.raises(OutputError, match="expected a directory"):
        prediction_files.predict_file(replace(request, output=path), lambda device: pytest.fail("loaded"))


def test_nothing_is_written_if_no_dialogue_can_be_read(tmp_path):
    class Unfit(Echo):
        def detail(self, pairs, **options):
            raise DialogueError(f"dialogue {pairs[0].dialogue.id}: unfit")

    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(line_of(dialogue_of("a", 2)) + line_of(dialogue_of("b", 2)))
    request = prediction_files.FileRequest(path, output)
    with pytest.raises(DialogueError, match="can read no dialogue; the first one: dialogue a: unfit"):
        prediction_files.predict_file(request, lambda runtime: Unfit(), device="cpu")
    assert not output.exists()


def test_a_late_fault_leaves_the_earlier_output_as_it_was(directory, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("kept\n")
    path = tmp_path / "in.jsonl"
    path.write_text(line_of(dialogue_of("a", 2)) + "{\n")
    with pytest.raises(CorpusError, match="line 2"):
        predict(directory, path, output, device="cpu")
    assert output.read_text() == "kept\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no dialogue|nothing"),
        ('{"id": "a", "utterances": []}\n', "1 to 2000 utterances"),
        ('{"id": "a", "utterances": [{"turn": 1, "speaker": "A", "utterance": " "}]}\n', "not empty"),
    ],
)
def test_empty_inputs_are_refused_in_one_line(directory, tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        predict(directory, path, tmp_path / "out.jsonl", device="cpu")


def test_a_dialogue_of_one_utterance(student):
    (found,) = student.predict([dialogue_of("one", 1)])
    assert found.key == ("one", 1, 1)


def test_show_prints_every_dialogue_and_needs_no_output(directory, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(line_of(dialogue_of(f"name{n}", 20)) for n in range(2)))
    predict(directory, path, device="cpu", max_distance=0, show=True)
    out = capsys.readouterr().out
    assert "dialogue name0" in out and "dialogue name1" in out and "turn 20 ." in out
    assert "\x1b[" not in out
    assert "40 pairs of 2 dialogues" in out


def test_nothing_to_do_is_a_usage_error(directory):
    done = CliRunner().invoke(app, ["predict", "--student", str(directory), "--input", "x"])
    assert done.exit_code == 2 and "--show" in done.output


def test_the_command_lines_answer_without_torch():
    code = (
        "import sys, kdecs.cli, kdecs.serve.server\nfrom kdecs.student.predict import streaming\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("output", "message"), [("in.jsonl", "is the input"), ("model/out.jsonl", "lies inside")]
)
def test_an_output_that_is_an_input_is_refused_before_the_model_is_loaded(tmp_path, output, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "in.jsonl").write_text(line_of(dialogue_of("a", 2)))
    request = prediction_files.FileRequest(tmp_path / "in.jsonl", tmp_path / output, model=tmp_path / "model")
    with pytest.raises(OutputError, match=message):
        prediction_files.predict_file(request, lambda runtime: pytest.fail("loaded"), device="cpu")
    assert (tmp_path / "in.jsonl").read_text() == line_of(dialogue_of("a", 2))


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "in.jsonl").write_text(line_of(dialogue_of("a", 2)))
    request = prediction_files.FileRequest(tmp_path / "in.jsonl", tmp_path)
    with pytest.raises(OutputError, match="is a directory"):
        prediction_files.predict_file(request, lambda runtime: pytest.fail("loaded"), device="cpu")


def test_pipes_are_read_once_and_written_through(tmp_path, capsys):
    """`kdecs predict --input <(…) --output >(…)`."""
    source, target = tmp_path / "source", tmp_path / "target"
    os.mkfifo(source)
    os.mkfifo(target)
    received: list[str] = []
    ends = [
        threading.Thread(target=lambda: source.write_text(line_of(dialogue_of("é\x1b[2J", 101)))),
        threading.Thread(target=lambda: received.append(target.read_text(encoding="utf-8"))),
    ]
    for end in ends:
        end.start()
    request = prediction_files.FileRequest(source, target, max_distance=0, has_example=False)
    prediction_files.predict_file(request, lambda runtime: Echo(), device="cpu")
    for end in ends:
        end.join()
    assert [json.loads(line)["target"] for line in received[0].splitlines()] == list(range(1, 102))
    err = capsys.readouterr().err
    assert f"{source}: dialogue é\\x1b[2J has 101 utterances" in err and "\x1b" not in err
