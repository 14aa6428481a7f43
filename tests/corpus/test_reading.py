import copy
import json
import os
from pathlib import Path

import pytest

from kdecs.corpus.reading import (
    bundled_sample,
    find_faults,
    iter_dialogues,
    open_dialogues,
    read_corpus,
    read_table,
)
from kdecs.corpus.schema import FINE_EMOTIONS, FINE_TO_COARSE, KNOWN_EMOTIONS, Evidence, map_corpus
from kdecs.errors import CorpusError

EVIDENCE, SPAN = "expanded emotion cause evidence", "expanded emotion cause span"


def only_fault(path, **options):
    """The one fault of a file, which `read_corpus` refuses with the same line."""
    faults = find_faults(path, **options)
    assert len(faults) == 1, [str(fault) for fault in faults]
    with pytest.raises(CorpusError) as refusal:
        read_corpus(path, **options)
    assert str(refusal.value) == str(faults[0])
    assert "\n" not in str(faults[0])
    assert faults[0].file == str(path)
    return faults[0]


def test_valid_oddities_are_read(write, valid_document):
    corpus = read_corpus(write(valid_document))
    assert [dialogue.id for dialogue in corpus.dialogues] == ["tr_1", "tr_2"]
    first, second, third, fourth, fifth = corpus.dialogues[0].utterances
    assert [u.emotion for u in corpus.dialogues[0].utterances] == [
        "happiness",
        "surprise",
        "neutral",
        "sadness",
        "anger",
    ]
    assert corpus.normalised == {"happy": 1, "surprised": 1, "sad": 1}
    assert second.evidence == (Evidence(2, "We won"), Evidence(1, "We won"), Evidence(1, "game"))
    assert third.evidence is None
    assert fourth.evidence[0] == Evidence(None, None)
    assert fifth.text == third.text
    assert [u.emotion for u in corpus.dialogues[1].utterances] == ["excited", "frustrated", "gratitude"]
    assert corpus.dialogues[1].utterances[1].evidence == ()
    assert first.speaker == "B"


def test_every_known_label_is_read_without_an_option(write, valid_document):
    for emotion in (*KNOWN_EMOTIONS, *FINE_EMOTIONS):
        valid_document["tr_1"][0][0]["emotion"] = emotion
        assert read_corpus(write(valid_document)).dialogues[0].utterances[0].emotion == emotion


def test_replaced_variants_and_dropped_pairs_are_logged(write, valid_document, caplog):
    path = write(valid_document)
    read_corpus(path, log=False)
    assert caplog.messages == []
    read_corpus(path)
    assert f"{path}: label variants replaced: happy (1), sad (1), surprised (1)" in caplog.messages
    assert sum("lies in the future" in message for message in caplog.messages) == 1


def test_json_lines_hold_the_same_corpus(write, valid_document):
    lines = [json.dumps({"id": key, "utterances": value[0]}) for key, value in valid_document.items()]
    expected = read_corpus(write(valid_document)).dialogues
    for text in ("\n".join(lines), "\r\n".join(lines) + "\r\n\r\n", "\n\n" + "\n".join(lines)):
        # By name, and by content under another name.
        for name in ("corpus.jsonl", "lines.json", "lines.txt"):
            path = write(text, name)
            assert read_corpus(path).dialogues == expected
            assert tuple(iter_dialogues(path)) == expected
    assert read_corpus(write(lines[0], "one.json")).dialogues == expected[:1]


def test_json_lines_are_streamed(write, valid_document):
    line = json.dumps({"id": "tr_1", "utterances": valid_document["tr_1"][0]})
    stream = iter_dialogues(write(line + "\nno JSON", "corpus.jsonl"))
    assert next(stream).id == "tr_1"
    with pytest.raises(CorpusError, match="line 2"):
        next(stream)


def test_a_byte_order_mark_is_tolerated(write, valid_document):
    text = json.dumps(valid_document)
    assert len(read_corpus(write(b"\xef\xbb\xbf" + text.encode())).dialogues) == 2
    line = json.dumps({"id": "tr_1", "utterances": valid_document["tr_1"][0]})
    assert len(read_corpus(write(b"\xef\xbb\xbf" + line.encode(), "corpus.jsonl")).dialogues) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_refused_by_name(write, valid_document, encoding):
    assert "UTF-16" in only_fault(write(json.dumps(valid_document).encode(encoding))).found


def test_json_lines_in_utf_16_are_one_fault(write, valid_document):
    lines = [json.dumps({"id": key, "utterances": value[0]}) for key, value in valid_document.items()]
    fault = only_fault(write("\n".join(lines).encode("utf-16"), "corpus.jsonl"))
    assert (fault.dialogue, fault.found) == (None, "UTF-16 or UTF-32 text or binary data")


def test_other_bytes_are_refused_with_their_offset(write, valid_document):
    data = json.dumps(valid_document, ensure_ascii=False).replace("We won", "café").encode("latin-1")
    fault = only_fault(write(data))
    assert fault.found == f"the byte 0xe9 at offset {data.index(0xE9)}"


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ("", "nothing"),
        ("  \n ", "nothing"),
        ("{", "no JSON at line 1"),
        ("nonsense", "no JSON at line 1"),
        ("[]", "a list of 0"),
        ("17", "17"),
        ("null", "null"),
        ("{}", "no dialogue"),
        ('{"a": NaN}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_corpus(write, document, found):
    assert found in only_fault(write(document)).found


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({}, "an object"),
        ([], "a list of 0"),
        ([{}], "a list of an object"),
        ([[], []], "a list of 2"),
        ("text", "'text'"),
        (None, "null"),
        ([[]], "0"),
        ([[7]], "7"),
        ([["text"]], "'text'"),
    ],
)
def test_wrong_nesting(write, value, found):
    fault = only_fault(write({"tr_1": value}))
    assert (fault.dialogue, found in fault.found) == ("tr_1", True)


@pytest.mark.parametrize(
    ("turn", "field", "value", "found", "expected"),
    [
        (1, "turn", 2, "2", "1 ("),
        (2, "turn", 1, "1", "2 ("),
        (2, "turn", 3, "3", "2 ("),
        (2, "turn", 2.0, "2.0", "2 ("),
        (2, "turn", "2", "'2'", "2 ("),
        (1, "turn", True, "true", "1 ("),
        (1, "turn", None, "null", "1 ("),
        (1, "turn", -1, "-1", "1 ("),
        (1, "turn", 10**30, "an integer of 31 digits", "1 ("),
        (1, "speaker", 3, "3", "a string"),
        (1, "speaker", " ", "' '", "not empty"),
        (3, "utterance", "", "''", "not empty"),
        (3, "utterance", "\t ", "'\\t '", "not empty"),
        (3, "utterance", ["Oh ."], "a list of 1", "a string"),
        (3, "emotion", "bliss", "'bliss'", "one of acceptance"),
        (3, "emotion", "Happiness", "'Happiness'", "one of"),
        (3, "emotion", "", "''", "one of"),
        (3, "emotion", None, "null", "one of"),
        (3, "emotion", 1, "1", "one of"),
        (3, "emotion", ["anger"], "a list of 1", "one of"),
        (1, EVIDENCE, 1, "1", "a list"),
        (1, EVIDENCE, [0], "0", "a turn from 1 to 5"),
        (1, EVIDENCE, [6], "6", "a turn from 1 to 5"),
        (1, EVIDENCE, [-1], "-1", "a turn from 1 to 5"),
        (1, EVIDENCE, [1.0], "1.0", "a turn from 1 to 5"),
        (1, EVIDENCE, [True], "true", "a turn from 1 to 5"),
        (1, EVIDENCE, ["1"], "'1'", "a turn from 1 to 5"),
        (1, EVIDENCE, ["c"], "'c'", "a turn from 1 to 5"),
        (1, EVIDENCE, [None], "null", "a turn from 1 to 5"),
        (1, EVIDENCE, [[1]], "a list of 1", "a turn from 1 to 5"),
        (1, EVIDENCE, [10**400], "an integer of 401 digits", "a turn from 1 to 5"),
        (1, EVIDENCE, ["b"], "'won the game' beside the evidence 'b'", '"b" beside "b"'),
        (1, SPAN, "won", "'won'", "a list"),
        (1, SPAN, ["b"], "'b' beside the evidence 1", '"b" beside "b"'),
        (1, SPAN, [""], "''", "not empty"),
        (1, SPAN, [" "], "' '", "not empty"),
        (1, SPAN, [3], "3", "a string"),
        (1, SPAN, ["Won the game"], "'Won the game'", "an exact substring of utterance 1"),
        (1, SPAN, ["won  the game"], "'won  the game'", "an exact substring of utterance 1"),
    ],
)
def test_a_wrong_value_is_found_where_it_stands(write, valid_document, turn, field, value, found, expected):
    valid_document["tr_1"][0][turn - 1][field] = value
    if (turn, field) == (3, "utterance"):
        valid_document["tr_1"][0][3].update({EVIDENCE: [], SPAN: []})
    fault = only_fault(write(valid_document))
    assert (fault.dialogue, fault.turn) == ("tr_1", turn)
    assert fault.field == (SPAN if "beside" in found else field)
    assert found in fault.found
    assert expected in fault.expected


@pytest.mark.parametrize("field", ["turn", "speaker", "utterance", "emotion", EVIDENCE, SPAN])
def test_a_missing_key(write, valid_document, field):
    del valid_document["tr_2"][0][1][field]
    fault = only_fault(write(valid_document))
    assert (fault.dialogue, fault.turn, fault.field, fault.found) == ("tr_2", 2, field, "no such key")


def test_lists_of_different_length(write, valid_document):
    valid_document["tr_1"][0][1][SPAN].pop()
    fault = only_fault(write(valid_document))
    assert (fault.turn, fault.field, fault.found) == (2, SPAN, "2 spans")


def test_repeated_keys_are_faults_wherever_they_stand(write, valid_document):
    text = json.dumps(valid_document)
    inner = text.replace('"emotion": "happy"', '"emotion": "happy", "emotion": "sad"')
    fault = only_fault(write(inner))
    assert (fault.dialogue, fault.turn, fault.field) == ("tr_1", 1, "emotion")
    outer = text.replace('"tr_2": [[', '"tr_1": [[')
    assert only_fault(write(outer)).dialogue == "tr_1"
    free = text.replace('"free": [1.5]', '"free": [1.5], "free": 2')
    assert only_fault(write(free)).field == "free"


def test_both_dialogues_of_one_id_are_checked(write, valid_document):
    valid_document["tr_1"][0][0]["emotion"] = "bliss"
    text = json.dumps(valid_document).replace('"tr_2": [[', '"tr_1": [[')
    assert [fault.field for fault in find_faults(write(text))] == ["emotion", "id"]


def test_every_fault_of_a_file_is_found(write, valid_document):
    broken = copy.deepcopy(valid_document)
    broken["tr_1"][0][0] |= {"turn": 9, "speaker": None, "emotion": "bliss"}
    broken["tr_1"][0][1] |= {EVIDENCE: [2, 77, 1], SPAN: ["nowhere", "x", "gone"]}
    broken["tr_2"][0].append("no object")
    broken["tr_3"] = []
    faults = find_faults(write(broken))
    assert [(f.dialogue, f.turn, f.field) for f in faults] == [
        ("tr_1", 1, "turn"),
        ("tr_1", 1, "speaker"),
        ("tr_1", 1, "emotion"),
        ("tr_1", 2, SPAN),
        ("tr_1", 2, EVIDENCE),
        ("tr_1", 2, SPAN),
        ("tr_2", 4, None),
        ("tr_3", None, None),
    ]
    with pytest.raises(CorpusError, match="the first of 8 faults; kdecs corpus verify"):
        read_corpus(write(broken))


@pytest.mark.parametrize("identifier", ["", " ", "\ud800"])
def test_ids_that_name_nothing(write, valid_document, identifier):
    valid_document[identifier] = valid_document.pop("tr_2")
    assert only_fault(write(json.dumps(valid_document))).field == "id"


def test_half_of_a_surrogate_pair_is_refused(write, valid_document):
    valid_document["tr_1"][0][2]["utterance"] = "Oh \ud83d ."
    valid_document["tr_1"][0][3].update({EVIDENCE: [], SPAN: []})
    assert "valid Unicode" in only_fault(write(valid_document)).expected


def test_absurd_names_are_refused_in_a_short_line(write, valid_document):
    name = "x" * 1_000_000
    long_id = only_fault(write({name: valid_document["tr_2"]}))
    assert (long_id.field, long_id.found) == ("id", "1000000 characters")
    text = json.dumps(valid_document).replace('"flag": "F"', f'"{name}": 1, "{name}": 2')
    repeated = only_fault(write(text))
    assert repeated.found == "the key more than once"
    for fault in (long_id, repeated):
        assert len(str(fault)) < 500


def test_absurd_sizes_are_refused(write, valid_document):
    long = copy.deepcopy(valid_document)
    long["tr_1"][0][4]["utterance"] = "a" * 200_000
    assert only_fault(write(long)).found == "200000 characters"
    many = {
        "tr_1": [
            [{"turn": n, "speaker": "A", "utterance": "a", "emotion": "neutral"} for n in range(1, 6002)]
        ]
    }
    assert only_fault(write(many)).found == "6001"
    digits = json.dumps(valid_document).replace('"turn": 3', '"turn": ' + "3" * 5000, 1)
    assert only_fault(write(digits)).found == "an integer of 5000 digits"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("no JSON", "no JSON"),
        ("[]", "a list"),
        ('{"id": "x"}', "an object"),
        ('{"id": "x", "utterances": 3}', "3"),
        ('{"id": 3, "utterances": [{"turn": 1, "speaker": "A", "utterance": "a", "emotion": "anger"}]}', "3"),
        ('{"id": "x", "utterances": []}', "0"),
        ("\x00", "UTF-16"),
    ],
)
def test_a_faulty_line(write, valid_document, line, found):
    sound = json.dumps({"id": "tr_1", "utterances": valid_document["tr_1"][0]})
    assert found in only_fault(write(f"{sound}\n{line}\n", "corpus.jsonl")).found


def test_faults_of_lines_do_not_hide_each_other(write, valid_document):
    sound = json.dumps({"id": "tr_1", "utterances": valid_document["tr_1"][0]})
    path = write(b"\n".join([sound.encode(), b"\xff\xff", b"{", sound.encode()]), "corpus.jsonl")
    assert [(f.dialogue, f.field) for f in find_faults(path)] == [
        ("line 2", None),
        ("line 3", None),
        ("tr_1", "id"),
    ]


def test_unlabelled_dialogues(write):
    utterance = {"turn": 1, "speaker": "A", "utterance": "Hello ."}
    path = write({"x": [[utterance]]})
    assert only_fault(path).field == "emotion"
    dialogue = read_corpus(path, labelled=False).dialogues[0]
    assert (dialogue.utterances[0].emotion, dialogue.utterances[0].evidence) == (None, None)
    assert len(read_corpus(bundled_sample("unlabelled"), labelled=False).dialogues) > 1
    wrong = write({"x": [[utterance | {"emotion": "bliss"}]]})
    assert only_fault(wrong, labelled=False).field == "emotion"


def test_iemocap_is_known_by_its_ids_whatever_the_name(write):
    utterances = [
        {"turn": 1, "speaker": "F", "utterance": "I can't .", "emotion": "frustrated"},
        {"turn": 2, "speaker": "F", "utterance": "I just can't .", "emotion": "excited"},
    ]
    assert read_corpus(write({"Ses05F_impro01": [utterances]})).dialogues[0].part == "iemocap"
    for name in ("other.json", "dailydialog_test.json"):
        ids = ("train.Ses05F_impro01", "test.test.Ses01M_script01_1", "valid.Ses02F_impro03")
        corpus = read_corpus(write({id: [utterances] for id in ids}, name))
        assert {dialogue.part for dialogue in corpus.dialogues} == {"iemocap"}
    for id in ("x", "tr_10", "SessionsF_1", "tr_1Ses01F_1"):
        assert read_corpus(write({id: [utterances]}, "iemocap_test.json")).dialogues[0].part == "dailydialog"
    assert read_corpus(write({"x": [utterances]}), part="mine").dialogues[0].part == "mine"


def test_label_sets(write, valid_document):
    path = write(valid_document)
    assert only_fault(path, label_set="coarse").found == "'gratitude'"
    valid_document["tr_2"][0][2]["emotion"] = "neutral"
    valid_document["tr_1"][0][0]["emotion"] = "fear"
    fine = find_faults(write(valid_document), label_set="fine")
    assert [fault.found for fault in fine] == ["'fear'", "'excited'", "'frustrated'"]


def test_fine_labels_map_to_coarse_ones(write, valid_document):
    assert set(FINE_TO_COARSE) == set(FINE_EMOTIONS)
    corpus = read_corpus(write(valid_document))
    coarse = map_corpus(corpus)
    assert [u.emotion for u in coarse.dialogues[1].utterances] == ["excited", "frustrated", "happiness"]
    assert coarse.dialogues[0].utterances[1].evidence == corpus.dialogues[0].utterances[1].evidence
    table = read_table(write({"gratitude": "neutral", "excited": "happiness"}, "table.json"))
    mapped = map_corpus(corpus, table)
    assert [u.emotion for u in mapped.dialogues[1].utterances] == ["happiness", "frustrated", "neutral"]


@pytest.mark.parametrize(
    "table",
    [
        "[]",
        "{",
        '{"worry": "bliss"}',
        '{" ": "fear"}',
        '{"worry": 3}',
        "7",
        '{"joy": "fear", "joy": "like"}',
    ],
)
def test_a_faulty_table_is_refused(write, table):
    path = write(table, "table.json")
    with pytest.raises(CorpusError, match=r"table\.json: "):
        read_table(path)
    with pytest.raises(CorpusError, match="no_table"):
        read_table(path.parent / "no_table.json")


def test_labels_of_ones_own_are_known_where_a_table_maps_them(write, valid_document):
    valid_document["tr_1"][0][0]["emotion"] = "joy"
    valid_document["tr_2"][0][2]["emotion"] = "happy"  # a spelling variant, which the table maps first
    path = write(valid_document)
    assert only_fault(path).found == "'joy'"
    table = read_table(write({"joy": "like", "happy": "surprise"}, "table.json"))
    corpus = map_corpus(read_corpus(path, table=table), table)
    assert [corpus.dialogues[d].utterances[u].emotion for d, u in ((0, 0), (1, 2))] == ["like", "surprise"]
    lines = (json.dumps({"id": id, "utterances": nested[0]}) for id, nested in valid_document.items())
    opened = open_dialogues(write("\n".join(lines), "x.jsonl"), table)
    assert [d.id for d in opened] == ["tr_1", "tr_2"] and opened[0].utterances[0].emotion == "joy"


def test_paths_that_hold_no_file(tmp_path):
    for path in (tmp_path / "nowhere.json", tmp_path, tmp_path / "nul\0.json"):
        assert "a corpus file" in only_fault(path).expected
    with pytest.raises(CorpusError, match="no bundled sample 'nothing'"):
        bundled_sample("nothing")


def test_a_pipe_is_refused_before_anything_is_read_of_it(tmp_path):
    """What a first look takes out of a pipe is gone; it is not even opened, which would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    assert only_fault(tmp_path / "pipe").found == "a pipe or a device"
    assert only_fault(Path("/dev/null")).expected.startswith("a corpus file")
