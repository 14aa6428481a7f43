"""What a config asks of the corpus files: dropped twins, shares, coarse emotions by a table of one's own."""

import json
from pathlib import Path

import pytest

from kdecs.config import ConfigError, parse_config
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import COARSE_EMOTIONS
from kdecs.corpus.splits import (
    CorpusConfig,
    GivenEmotions,
    find_duplicates,
    open_splits,
    read_split,
    require_causes,
    require_spans,
    training_split,
    warn_of_shared_texts,
)
from kdecs.errors import CorpusError


def config(**values: object) -> CorpusConfig:
    files = {split: str(bundled_sample(split)) for split in ("train", "valid", "test")}
    return parse_config(CorpusConfig, {**files, **values}, source="test")


def test_share_is_of_what_is_left_after_dropping(tmp_path: Path) -> None:
    train = json.loads(bundled_sample("train").read_text(encoding="utf-8"))
    valid = json.loads(bundled_sample("valid").read_text(encoding="utf-8"))
    twin = next(iter(valid))
    path = tmp_path / "train.json"
    path.write_text(json.dumps({**train, "twin": valid[twin]}))
    kept = training_split(config(train=str(path)))
    assert "twin" in {dialogue.id for dialogue in kept}
    dropped = training_split(config(train=str(path), drop_cross_split=True))
    assert {d.id for d in kept} - {d.id for d in dropped} == {"twin"}
    half = training_split(config(train=str(path), drop_cross_split=True, train_share=0.5))
    assert len(half) == len(train) // 2


def test_given_emotions_stand_for_those_that_are_missing_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In one file or several, of any format, with twins left out or not; mapped as the corpus' own are."""
    gold = {d.id: d for d in read_corpus(bundled_sample("train")).dialogues[:3]}
    raw: dict[str, list[dict[str, object]]] = {
        d.id: [{"turn": u.turn, "speaker": u.speaker, "utterance": u.text} for u in d.utterances]
        for d in gold.values()
    }
    first, *others = raw
    raw[first][0]["emotion"] = "anger"
    valid_twin = {"twin": json.loads(bundled_sample("valid").read_text(encoding="utf-8")).popitem()[1]}
    one, two = tmp_path / "one.json", tmp_path / "two.jsonl"
    one.write_text(json.dumps({first: [raw[first]], **valid_twin}))
    two.write_text("".join(json.dumps({"id": name, "utterances": raw[name]}) + "\n" for name in others))
    by_turn = {(d.id, u.turn): "worry" for d in gold.values() for u in d.utterances}
    given = GivenEmotions(tmp_path / "student.jsonl", by_turn)
    files = config(train=[str(one), str(two)], drop_cross_split=True)
    found = {d.id: d for d in training_split(files, given)}
    assert list(found) == list(gold) and "has coarse ones alone" not in caplog.text
    emotions = {(d.id, u.turn): u.emotion for d in found.values() for u in d.utterances}
    assert emotions == by_turn | {(first, 1): "anger"}
    assert {d.id: d.context_hashes for d in found.values()} == {n: d.context_hashes for n, d in gold.items()}
    coarse = open_splits(config(train=str(two), emotions="coarse"), given)["train"]
    assert {u.emotion for dialogue in coarse for u in dialogue.utterances} == {"fear"}
    with pytest.raises(CorpusError, match="field emotion: found no such key"):
        list(training_split(config(train=str(two))))
    del by_turn[others[0], 2]
    with pytest.raises(
        CorpusError, match=rf"{others[0]}, turn 2: found no emotion .* none in .*student.jsonl"
    ):
        list(training_split(config(train=str(two)), given))


def test_training_dialogues_of_another_split_are_left_out(write, valid_document, caplog) -> None:
    """The texts decide, white space apart; speakers and labels do not."""
    train = write(valid_document, "train.json")
    other = {"te_9": valid_document["tr_2"]}
    other["te_9"][0][0]["utterance"] = "Hello   ."
    other["te_9"][0][0]["expanded emotion cause span"] = ["news", "Hello"]
    test = write(other, "test.json")
    assert [str(found) for found in find_duplicates(read_corpus(train), [read_corpus(test)])] == [
        f"{train}, dialogue tr_2: the same text as te_9 in {test}"
    ]
    files = {"train": str(train), "test": str(test)}
    assert len(training_split(config(**files))) == 2
    assert [dialogue.id for dialogue in training_split(config(**files, drop_cross_split=True))] == ["tr_1"]
    assert f"{train}: dropped 1 of 2 dialogues" in caplog.text


def test_coarse_emotions_by_the_built_in_table_and_by_an_own_one(tmp_path: Path) -> None:
    fine = config()
    assert any(u.emotion == "gratitude" for d in read_split(fine, fine.valid).dialogues for u in d.utterances)
    coarse = config(emotions="coarse")
    found = {u.emotion for d in read_split(coarse, coarse.valid).dialogues for u in d.utterances}
    assert found <= set(COARSE_EMOTIONS)
    table = tmp_path / "table.json"
    table.write_text('{"gratitude": "surprise"}')
    own = config(emotions="coarse", emotion_table=str(table))
    pairs = [
        (a.emotion, b.emotion)
        for x, y in zip(
            read_split(fine, fine.valid).dialogues, read_split(own, own.valid).dialogues, strict=True
        )
        for a, b in zip(x.utterances, y.utterances, strict=True)
    ]
    assert {b for a, b in pairs if a == "gratitude"} == {"surprise"}
    assert {d.emotion for x in training_split(own) for d in x.utterances} <= set(COARSE_EMOTIONS)


def test_table_without_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="emotion_table needs emotions: coarse"):
        config(emotion_table="table.json")


def test_validation_texts_that_are_trained_on_are_warned_of(write, valid_document, caplog) -> None:
    valid = write(valid_document, "valid.json")
    twins = {f"other_{name}": nested for name, nested in valid_document.items()}
    sample = json.loads(bundled_sample("train").read_text(encoding="utf-8"))
    one = {**sample, "a": twins["other_tr_1"]}
    for train, num_shared in ((valid_document, 2), (twins, 2), (one, 1), (sample, 0)):
        caplog.clear()
        files = {"train": str(write(train, "train.json")), "valid": str(valid)}
        warn_of_shared_texts(config(**files))
        assert (f"{num_shared} of 2 validation dialogues have the text" in caplog.text) == (num_shared > 0)
        caplog.clear()
        warn_of_shared_texts(config(**files, drop_cross_split=True))
        assert not caplog.text, "none of them is trained on"


def test_a_file_without_causes_is_refused(tmp_path: Path) -> None:
    require_causes(tmp_path, iter([False, True]))
    for none in ([], [False, False]):
        with pytest.raises(CorpusError, match="no cause to learn from or to validate on"):
            require_causes(tmp_path, none)


def test_a_file_without_spans_is_refused_where_spans_are_learnt(tmp_path: Path) -> None:
    path = tmp_path / "blocks.txt"
    path.write_text("1 2\n(2,1)\n1 | A | neutral | We won !\n2 | B | joy | Good !\n")
    with pytest.raises(CorpusError, match=r"turn 2: found a cause without a span.* task: ecpe"):
        require_spans(read_corpus(path))
    require_spans(read_corpus(bundled_sample("test"), log=False))


def ecf(write, first_id: int, **changes: object) -> str:
    """A file with one conversation in the format of SemEval-2024 Task 3."""
    said = [{"utterance_ID": 1, "text": f"We won {first_id} !", "speaker": "A", "emotion": "joy"}]
    conversation = {
        "conversation_ID": first_id,
        "conversation": said,
        "emotion-cause_pairs": [["1_joy", "1"]],
    }
    return str(write([conversation | changes], f"ecf-{first_id}.json"))


def test_several_training_files_are_one_split(write, valid_document, caplog) -> None:
    """One after another, in a share together, with emotions of both under RECCON's names."""
    reccon, other = str(write(valid_document, "reccon.json")), ecf(write, 7)
    lines = str(write(json.dumps({"id": "line", "utterances": valid_document["tr_2"][0]}), "lines.jsonl"))
    split = training_split(config(train=[reccon, other, lines], emotions="coarse"))
    assert [dialogue.id for dialogue in split] == ["tr_1", "tr_2", "7", "line"]
    assert [split[place].id for place in range(4)] == ["tr_1", "tr_2", "7", "line"] and len(split) == 4
    assert {d.utterances[0].emotion for d in (split[0], split[2])} == {"happiness"}
    alone = training_split(config(train=reccon, emotions="coarse"))
    assert [p.id for d in alone for p in pairs_of(d)] == [p.id for d in list(split)[:2] for p in pairs_of(d)]
    half = training_split(config(train=[reccon, other, lines], emotions="coarse", train_share=0.5))
    assert len(half) == 2 and [split[place] for place in half.places] == list(half)
    valid = str(write({"te_1": valid_document["tr_2"]}, "valid.json"))
    kept = training_split(config(train=[reccon, other], valid=valid, drop_cross_split=True))
    assert [dialogue.id for dialogue in kept] == ["tr_1", "7"]
    caplog.clear()
    warn_of_shared_texts(config(train=[other, reccon], valid=valid))
    assert f"of a training dialogue of {other}, {reccon}" in caplog.text


def test_training_files_with_equal_ids_are_refused(write, valid_document) -> None:
    first, second = (str(write(valid_document, name)) for name in ("a.json", "b.json"))
    with pytest.raises(
        CorpusError, match=r"b.json: has a dialogue with the id 'tr_1', .* --id-prefix"
    ) as refused:
        list(training_split(config(train=[first, second])))
    assert "\n" not in str(refused.value)


def test_fine_and_coarse_labels_together_are_warned_of(write, caplog) -> None:
    files = [str(bundled_sample("train")), ecf(write, 7)]
    list(training_split(config(train=files)))
    assert "train.json: has fine emotions (such as acceptance), and " in caplog.text
    assert "set corpus.emotions=coarse" in caplog.text
    caplog.clear()
    found = {u.emotion for d in training_split(config(train=files, emotions="coarse")) for u in d.utterances}
    list(training_split(config(train=[ecf(write, 8), files[1]])))
    assert found <= set(COARSE_EMOTIONS) and "fine emotions" not in caplog.text


def test_a_label_of_no_set_is_refused_unless_a_table_maps_it(write, tmp_path) -> None:
    odd = ecf(
        write,
        9,
        conversation=[{"utterance_ID": 1, "text": "Oh !", "speaker": "A", "emotion": "awe"}],
        **{"emotion-cause_pairs": [["1_awe", "1"]]},
    )
    files = [str(bundled_sample("train")), odd]
    with pytest.raises(CorpusError, match=r"ecf-9\.json, dialogue 9, turn 1, field emotion: found 'awe'"):
        training_split(config(train=files))
    table = tmp_path / "table.json"
    table.write_text('{"awe": "surprise"}')
    split = training_split(config(train=files, emotions="coarse", emotion_table=str(table)))
    assert list(split)[-1].utterances[0].emotion == "surprise"
