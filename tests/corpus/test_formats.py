"""The formats besides RECCON's schema: what is read, every fault with its place, and conversions in both directions."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kdecs.corpus.checking import OUTSIDE, Checker
from kdecs.corpus.commands import app
from kdecs.corpus.formats.recognise import format_of
from kdecs.corpus.formats.writing import DialogueWriter
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import (
    bundled_sample,
    find_faults,
    iter_dialogues,
    iter_raw,
    open_dialogues,
    read_corpus,
)
from kdecs.corpus.schema import Evidence
from kdecs.errors import CorpusError

ECF = Path(os.environ.get("KDECS_ECF", Path(__file__).parents[2].parent / "shared" / "ecf"))

CONVERSATIONS: list[dict[str, Any]] = [
    {
        "conversation_ID": 12,
        "conversation": [
            {"utterance_ID": 1, "text": "We are late .", "speaker": "Ann", "emotion": "neutral"},
            {"utterance_ID": 2, "text": "So we are late !", "speaker": "Bo_b", "emotion": "joy"},
            {
                "utterance_ID": 3,
                "text": "Why_ ?",
                "speaker": "Ann",
                "emotion": "anger",
                "video_name": "d.mp4",
            },
            {"utterance_ID": 4, "text": "Because .", "speaker": "Ann", "emotion": "fear"},
        ],
        "emotion-cause_pairs": [
            ["2_joy", "3_Why_"],
            ["2_joy", "1_late"],
            ["3_anger", "3_Why_ ?"],
            ["2_joy", "1_late"],
        ],
    }
]
BLOCKS = """12 4
 (2,3),(2,1),(3,3),(2,1)
1 | Ann | neutral | We are late . | 00:20:06,166-00:20:07,208
2 | Bo_b | joy | So we are late !
3 | Ann | anger | Why_ ?
4 | Ann | fear | Because .
"""
TABLE = """Turn,Dialogue,Speaker,Text,Emotion,free
1,12,Ann,We are late .,neutral,x
2,12,Bo_b,"So we are ""late"" !",Joy,
1,13,Ann,"Why_ ?
Again",anger,
"""
TRANSCRIPT = """Ann: We are late .
Bo b : So: we are late !

Ann:Why_ ?
"""


def changed(**values: Any) -> str:
    """The conversations with values of the conversation, or of its third utterance, replaced; None removes a key."""
    document = json.loads(json.dumps(CONVERSATIONS))
    for key, value in values.items():
        is_conversation = key in ("conversation_ID", "conversation", "pairs")
        place = document[0] if is_conversation else document[0]["conversation"][2]
        name = "emotion-cause_pairs" if key == "pairs" else key
        place[name] = value
        if value is None:
            del place[name]
    return json.dumps(document)


def test_conversations_are_read_with_own_earlier_and_later_causes(write, caplog):
    corpus = read_corpus(write(CONVERSATIONS))
    first, second, third, fourth = corpus.dialogues[0].utterances
    assert corpus.dialogues[0].id == "12"
    assert [u.emotion for u in corpus.dialogues[0].utterances] == ["neutral", "happiness", "anger", "fear"]
    assert (first.evidence, fourth.evidence) == (None, ())
    assert second.evidence == (Evidence(3, "Why_"), Evidence(1, "late"), Evidence(1, "late"))
    assert third.evidence == (Evidence(3, "Why_ ?"),)
    # One line, whatever the number of later causes: they are data here.
    assert [message for message in caplog.messages if "after the target" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_unlabelled_conversations_and_subtask_2_are_read(write):
    unlabelled = [
        CONVERSATIONS[0]
        | {
            "conversation": [
                {k: v for k, v in u.items() if k != "emotion"} for u in CONVERSATIONS[0]["conversation"]
            ]
        }
    ]
    del unlabelled[0]["emotion-cause_pairs"]
    (dialogue,) = iter_dialogues(write(unlabelled), labelled=False)
    assert {(u.emotion, u.evidence) for u in dialogue.utterances} == {(None, None)}
    assert {fault.field for fault in find_faults(write(unlabelled))} == {"emotion"}
    pairs = read_corpus(write(changed(pairs=[["2_joy", "1"], ["3_anger", "3"]]))).dialogues[0]
    assert pairs.utterances[1].evidence == (Evidence(1, ""),)
    assert [p.is_cause for p in pairs_of(pairs) if p.target == 3] == [False, False, True]


def test_blocks_are_the_conversations_without_spans(write):
    expected = read_corpus(write(CONVERSATIONS)).dialogues[0]
    for text in (BLOCKS, "\ufeff\n" + BLOCKS.replace("\n", "\r\n"), BLOCKS.replace(" | ", "|")):
        (dialogue,) = read_corpus(write(text, "blocks.txt")).dialogues
        assert (dialogue.id, dialogue.context_hashes) == (expected.id, expected.context_hashes)
        for found, known in zip(dialogue.utterances, expected.utterances, strict=True):
            assert found.emotion == known.emotion
            assert [e.turn for e in found.evidence or ()] == [e.turn for e in known.evidence or ()]
            assert {e.span for e in found.evidence or ()} <= {""}


def test_tables_and_transcripts_are_read(write):
    for text in (
        TABLE,
        TABLE.replace(",", ";"),
        "\ufeff" + TABLE.replace(",", "\t").replace("\n", "\r\n", 3),
    ):
        first, second = read_corpus(write(text)).dialogues
        assert [(u.speaker, u.text, u.emotion) for u in first.utterances] == [
            ("Ann", "We are late .", "neutral"),
            ("Bo_b", 'So we are "late" !', "happiness"),
        ]
        assert (second.id, second.utterances[0].text) == ("13", "Why_ ?\nAgain")
    for text in (TRANSCRIPT, TRANSCRIPT.replace("\n\n", "\n \n\n")):
        dialogues = list(iter_dialogues(write(text), labelled=False))
        assert [d.id for d in dialogues] == ["1", "2"]
        assert [[(u.turn, u.speaker, u.text) for u in d.utterances] for d in dialogues] == [
            [(1, "Ann", "We are late ."), (2, "Bo b", "So: we are late !")],
            [(1, "Ann", "Why_ ?")],
        ]


@pytest.mark.parametrize("name", ["corpus.json", "corpus.jsonl", "corpus.csv", "corpus"])
def test_the_content_tells_the_format_whatever_the_name(write, valid_document, name):
    lines = "\n".join(json.dumps({"id": k, "utterances": v[0]}) for k, v in valid_document.items())
    documents = {
        "reccon": json.dumps(valid_document),
        "jsonl": lines,
        "semeval": json.dumps(CONVERSATIONS, indent=2),
        "ecpe": BLOCKS,
        "table": TABLE,
        "transcript": TRANSCRIPT,
    }
    for expected, text in documents.items():
        for form in (text, "\n\n" + text, "\ufeff" + text):
            path = write(form, name)
            assert format_of(path).name == expected
            assert find_faults(path, labelled=False) == []
    assert format_of(write(json.dumps(valid_document, indent=1), name)).name == "reccon"
    assert len(open_dialogues(write(documents["semeval"], name))) == 1


@pytest.mark.parametrize(
    ("text", "dialogue", "turn", "field", "found"),
    [
        (changed(text=" "), "12", 3, "text", "' '"),
        (changed(text=None), "12", 3, "text", "no such key"),
        (changed(speaker=7), "12", 3, "speaker", "7"),
        (changed(utterance_ID=4), "12", 3, "utterance_ID", "4"),
        (changed(emotion="bliss", pairs=None), "12", 3, "emotion", "'bliss'"),
        (changed(conversation_ID=True), "conversation 1 of the list", None, "conversation_ID", "true"),
        (changed(conversation_ID=""), None, None, "conversation_ID", "''"),
        (changed(conversation={}), "12", None, "conversation", "an object of 0 keys"),
        (changed(conversation=[]), "12", None, "conversation", "0"),
        (changed(pairs={}), "12", None, "emotion-cause_pairs", "an object of 0 keys"),
        (changed(pairs=[["2_joy"]]), "12", None, "emotion-cause_pairs", "a list of 1"),
        (changed(pairs=[["2_joy", 1]]), "12", None, "emotion-cause_pairs", "a list of 2"),
        (changed(pairs=[["joy", "1"]]), "12", None, "emotion-cause_pairs", "'joy'"),
        (changed(pairs=[["2_joy", "late"]]), "12", None, "emotion-cause_pairs", "'late'"),
        (changed(pairs=[["2_joy", "1_ "]]), "12", 2, "emotion-cause_pairs", "'1_ '"),
        (changed(pairs=[["2_joy", "1_lame"]]), "12", 2, "emotion-cause_pairs", "'lame'"),
        (changed(pairs=[["2_joy", "5_late"]]), "12", None, "emotion-cause_pairs", "the utterance 5"),
        (changed(pairs=[["0_joy", "1_late"]]), "12", None, "emotion-cause_pairs", "the utterance 0"),
        (changed(pairs=[["2_fear", "1_late"]]), "12", 2, "emotion-cause_pairs", "the emotion 'fear'"),
        (
            json.dumps([*CONVERSATIONS, *CONVERSATIONS]),
            "12",
            None,
            "conversation_ID",
            "a second dialogue of this id",
        ),
        ("[{}", None, None, None, "no JSON at line 1"),
        (BLOCKS.replace("12 4", "12 5"), "12", None, None, "4 utterances"),
        (BLOCKS.replace("(3,3)", "(3,9)"), "12", None, "pairs", "the utterance 9"),
        (BLOCKS.replace("2 | Bo_b", "7 | Bo_b"), "12", 2, "number", "7"),
        (BLOCKS.replace(" | Why_ ?", ""), "12", 3, "text", "no such key"),
        (BLOCKS.replace("anger", "rage"), "12", 3, "emotion", "'rage'"),
        (BLOCKS + "nonsense\n", "line 7", None, None, "the line 'nonsense'"),
        (BLOCKS + "\n" + BLOCKS, "12", None, "id", "a second dialogue of this id"),
        (BLOCKS + "13 1\n(1,1\n1 | Ann | joy | a |", "13", None, "pairs", "the line '(1,1'"),
        (TABLE.replace("2,12", "3,12"), "12", 2, "turn", "3"),
        (TABLE.replace("2,12", "two,12"), "12", 2, "turn", "'two'"),
        (TABLE.replace("1,13,Ann", "1,13,"), "13", 1, "speaker", "''"),
        (TABLE.replace("We are late .", ""), "12", 1, "text", "''"),
        (TABLE.replace("anger", "bliss"), "13", 1, "emotion", "'bliss'"),
        (TABLE.replace("We are late .", "We, late ."), "line 2", None, None, "7 cells"),
        (TABLE.replace("1,13", "1,"), None, None, "dialogue", "''"),
        (TABLE + "1,12,Ann,a,joy,\n", "12", None, "dialogue", "a second dialogue of this id"),
        (TRANSCRIPT + "and so on\n", "2", 2, None, "the line 'and so on'"),
        (TRANSCRIPT.replace("Bo b : So: we are late !", "Bo b:"), "1", 2, None, "the line 'Bo b:'"),
    ],
)
def test_each_fault_has_its_place(write, text, dialogue, turn, field, found):
    path = write(text)
    labelled = format_of(path).name != "transcript"
    faults = find_faults(path, labelled=labelled)
    assert (dialogue, turn, field) in {(f.dialogue, f.turn, f.field) for f in faults}, [
        str(f) for f in faults
    ]
    assert found in {f.found for f in faults} | {
        f.found.partition(" (")[0].partition(", column")[0] for f in faults
    }
    with pytest.raises(CorpusError) as refusal:
        read_corpus(path, labelled=labelled)
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


def test_a_table_whose_quotes_do_not_close_is_one_fault(write):
    faults = find_faults(write(TABLE + '1,14,Ann,"So\n'))
    assert len(faults) == 1 and "quotes that close" in str(faults[0])


def convert(path: Path, target: str) -> tuple[str, list[str]]:
    writer = DialogueWriter(target)  # type: ignore[arg-type]
    return "".join(writer.text(iter_raw(path, Checker(str(path), labelled=False)))), writer.losses


def test_reccon_and_json_lines_lose_nothing_to_each_other(write, valid_document):
    """Not even misspelt labels and keys that the schema does not know."""
    lines, losses = convert(write(valid_document), "jsonl")
    assert losses == []
    back, losses = convert(write(lines, "lines"), "reccon")
    assert (json.loads(back), losses) == (valid_document, [])


@pytest.mark.parametrize("target", ["reccon", "jsonl", "semeval"])
def test_conversations_lose_nothing(write, target):
    text, losses = convert(write(CONVERSATIONS), target)
    assert losses == []
    back, losses = convert(write(text, "converted"), "semeval")
    found = json.loads(back)
    # RECCON's form keeps the causes of each target together.
    assert sorted(found[0].pop("emotion-cause_pairs")) == sorted(CONVERSATIONS[0]["emotion-cause_pairs"])
    assert found == [{k: v for k, v in CONVERSATIONS[0].items() if k != "emotion-cause_pairs"}]
    assert losses == []


def test_what_a_format_cannot_hold_is_said(write, valid_document):
    text, losses = convert(write(valid_document), "semeval")
    assert losses == [
        "causes outside their dialogue are left out: 2",
        "emotional utterances whose causes are not annotated appear as utterances without causes: 1",
        "ids of dialogues stay texts, where the task has numbers: 2",
        "the emotion excited is written as joy: 1",
        "the emotion frustrated is written as anger: 1",
        "the emotion gratitude is written as joy: 1",
    ]
    expected, found = (read_corpus(write(d, n)) for d, n in ((valid_document, "a"), (text, "b")))
    rows = [
        [(p.id, p.hash, p.spans) for d in c.dialogues for p in pairs_of(d) if p.is_cause]
        for c in (expected, found)
    ]
    assert rows[0] == rows[1]
    spanless, losses = convert(write(BLOCKS), "jsonl")
    assert losses == ["causes without a span, which this format needs, get their whole utterance: 4"]
    assert json.loads(spanless)["utterances"][2]["expanded emotion cause span"] == ["Why_ ?"]
    assert convert(write(BLOCKS), "semeval")[1] == []
    said = [{"utterance_ID": 1, "text": "plan b", "speaker": "Ann", "emotion": "joy"}]
    pairs = [["1_joy", "1_b"], ["1_joy", "1_plan"]]
    conversation = {"conversation_ID": 1, "conversation": said, "emotion-cause_pairs": pairs}
    text, losses = convert(write([conversation]), "reccon")
    assert losses == [
        'causes with the span "b", which here stands for a cause outside the dialogue, are left out: 1'
    ]
    [utterance] = read_corpus(write(text, "reccon")).dialogues[0].utterances
    assert [cause.span for cause in utterance.evidence] == ["plan"]


_TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Valid files of the shared task, with any texts."""
    found = []
    for number in draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True)):
        emotions = draw(
            st.lists(st.sampled_from(["joy", "anger", "neutral", "fear"]), min_size=1, max_size=4)
        )
        said = [
            {"utterance_ID": turn, "text": draw(_TEXTS), "speaker": draw(_TEXTS), "emotion": emotion}
            for turn, emotion in enumerate(emotions, start=1)
        ]
        pairs = []
        for target, emotion in enumerate(emotions, start=1):
            for cause in (
                draw(st.lists(st.integers(1, len(said)), max_size=3)) if emotion != "neutral" else ()
            ):
                text = said[cause - 1]["text"]
                start = draw(st.integers(0, len(text) - 1))
                span = text[start : draw(st.integers(start + 1, len(text)))]
                span = span if span.strip() else text
                if span != OUTSIDE:  # which RECCON cannot hold: the test above has its loss
                    pairs.append([f"{target}_{emotion}", f"{cause}_{span}"])
        found.append({"conversation_ID": number, "conversation": said, "emotion-cause_pairs": pairs})
    return found


@settings(max_examples=40, deadline=None)
@given(conversations(), st.sampled_from(["reccon", "jsonl", "semeval"]))
def test_any_conversations_come_back_unchanged(tmp_path_factory, document, target):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    before = read_corpus(path, log=False).dialogues
    text, losses = convert(path, target)
    path.write_bytes(text.encode())
    assert read_corpus(path, log=False).dialogues == before
    back, more = convert(path, "semeval")
    assert (json.loads(back), losses, more) == (document, [], [])


def test_convert_writes_a_file_or_refuses_it(write, tmp_path):
    source, output = write(CONVERSATIONS), tmp_path / "out.json"
    arguments = ["convert", str(source), "--to", "reccon", "--output"]
    assert CliRunner().invoke(app, [*arguments, str(output)]).exit_code == 0
    assert [d.id for d in read_corpus(output).dialogues] == ["12"]
    piped = CliRunner().invoke(app, [*arguments, "-"])
    assert json.loads(piped.stdout) == json.loads(output.read_text(encoding="utf-8"))
    before = output.read_bytes()
    for text in (changed(text=" "), changed(free=1e999), "nonsense"):
        source.write_text(text)
        assert isinstance(CliRunner().invoke(app, [*arguments, str(output)]).exception, CorpusError)
        assert output.read_bytes() == before
    assert CliRunner().invoke(app, [*arguments, str(source)]).exception is not None
    assert source.read_text() == "nonsense"


@pytest.mark.skipif(not ECF.is_dir(), reason=f"the shared task's files are not in {ECF}")
def test_the_shared_task_has_the_known_counts():
    files = [str(ECF / f"Subtask_1_{split}.json") for split in ("train", "test")]
    train, test = json.loads(CliRunner().invoke(app, ["stats", *files, "--json"]).stdout)
    assert [train[key] for key in ("dialogues", "utterances", "faults")] == [1374, 13619, 0]
    assert train["causes"] == {"own": 4707, "earlier": 4280, "later": 377}
    assert [test[key] for key in ("dialogues", "utterances", "faults")] == [341, 3101, 0]
    assert (test["causes"]["later"], sum(test["causes"].values())) == (77, 2256)


def test_the_sample_survives_all_formats(tmp_path):
    """The fine labels become the task's seven; texts, pairs and spans stay."""
    before = read_corpus(bundled_sample("test"), log=False)
    (tmp_path / "semeval").write_text(convert(bundled_sample("test"), "semeval")[0], encoding="utf-8")
    after = read_corpus(tmp_path / "semeval", log=False)
    for one, other in zip(before.dialogues, after.dialogues, strict=True):
        assert (one.id, one.context_hashes) == (other.id, other.context_hashes)
        assert [p.spans for p in pairs_of(one) if p.is_cause] == [
            p.spans for p in pairs_of(other) if p.is_cause
        ]
