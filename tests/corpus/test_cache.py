"""The tokenised cache: same content as encoding afresh, built once, keyed by content, mapped."""

import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from kdecs.artifact import read_manifest, sha256_of_file, verify_artifact
from kdecs.corpus import cache as cache_module
from kdecs.corpus.cache import cache_key, open_cache, ordered_emotions
from kdecs.corpus.encoding import PairEncoder
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import FINE_TO_COARSE


@pytest.fixture(scope="module")
def encoder(base):
    return PairEncoder(AutoTokenizer.from_pretrained(base), 256)


def check_against_encoding(cache, corpus_file: Path, encoder: PairEncoder) -> None:
    corpus = read_corpus(corpus_file)
    pairs = [(n, p) for n, d in enumerate(corpus.dialogues) for p in pairs_of(d, "fold1+neutral")]
    assert len(cache) == len(pairs)
    ids, hashes = cache.identities(range(len(cache)))
    assert ids == [pair.id for _, pair in pairs]
    assert hashes == [pair.hash for _, pair in pairs]
    for row, ((number, pair), found) in enumerate(
        zip(pairs, encoder.encode([pair for _, pair in pairs]), strict=True)
    ):
        assert cache.list_at("token_ids", row).tolist() == found.token_ids
        assert cache.offsets_at(row).tolist() == [list(offset) for offset in found.candidate_offsets]
        assert cache.emotions[cache.column("emotion")[row]] == pair.emotion
        for name in (
            "emotion_mask",
            "connective_mask",
            "start_mask",
            "end_mask",
            "candidate_first",
            "span_end",
        ):
            assert cache.column(name)[row] == getattr(found, name)
        assert cache.column("dialogue")[row] == number
        assert cache.num_tokens[row] == len(found.token_ids)
        assert cache.num_candidate_tokens[row] == len(found.candidate_offsets)


def test_rows_equal_fresh_encodings(tmp_path, corpus_files, encoder):
    cache = open_cache(corpus_files["valid"], encoder, tmp_path)
    check_against_encoding(cache, corpus_files["valid"], encoder)
    assert verify_artifact(cache.directory) == []


def test_several_record_batches_read_the_same(tmp_path, corpus_files, encoder, monkeypatch):
    monkeypatch.setattr(cache_module, "_ROWS_PER_BATCH", 7)
    cache = open_cache(corpus_files["valid"], encoder, tmp_path)
    check_against_encoding(cache, corpus_files["valid"], encoder)


def test_integer_and_token_columns_are_mapped_not_copied(tmp_path, corpus_files, encoder):
    cache = open_cache(corpus_files["valid"], encoder, tmp_path)
    for array in (cache.column("span_start"), cache.list_at("token_ids", 3)):
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_the_key_is_the_content(tmp_path, corpus_files, encoder, base):
    copy = tmp_path / "copy.json"
    copy.write_bytes(corpus_files["valid"].read_bytes())
    key = cache_key(corpus_files["valid"], encoder)
    assert cache_key(copy, encoder) == key
    assert cache_key(corpus_files["train"], encoder) != key
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert cache_key(copy, PairEncoder(tokenizer, 128)) != key
    tokenizer.add_tokens(["zzyzx"])
    assert cache_key(copy, PairEncoder(tokenizer, 256)) != key


def test_several_files_have_one_cache_and_a_single_one_keeps_its_own(tmp_path, corpus_files, encoder):
    both = (corpus_files["train"], corpus_files["valid"])
    cache = open_cache(both, encoder, tmp_path)
    parts = [open_cache(path, encoder, tmp_path) for path in both]
    assert cache.identities(range(len(cache)))[0] == [
        name for part in parts for name in part.identities(range(len(part)))[0]
    ]
    last = parts[0].column("dialogue").max() + 1
    assert cache.column("dialogue").tolist() == [
        *parts[0].column("dialogue").tolist(),
        *(parts[1].column("dialogue") + last).tolist(),
    ]
    assert set(read_manifest(cache.directory).inputs) == {"corpus", "corpus_1"}
    # What a key was before there could be several files.
    single = "\0".join((sha256_of_file(both[0]), encoder.fingerprint, "null", "1"))
    assert cache_key(both[0], encoder) == hashlib.sha256(single.encode()).hexdigest()
    assert set(read_manifest(parts[0].directory).inputs) == {"corpus"}


def _open(arguments: tuple[Path, Path, Path]) -> float:
    corpus_file, base, directory = arguments
    encoder = PairEncoder(AutoTokenizer.from_pretrained(base), 256)
    cache = open_cache(corpus_file, encoder, directory)
    return (cache.directory / "pairs.arrow").stat().st_mtime_ns


@pytest.mark.slow
def test_processes_that_race_build_it_once(tmp_path, corpus_files, base):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        times = pool.map(_open, [(corpus_files["valid"], base, tmp_path)] * 2)
    assert len(set(times)) == 1


def test_a_damaged_or_unfinished_cache_is_built_again(tmp_path, corpus_files, encoder):
    first = open_cache(corpus_files["valid"], encoder, tmp_path)
    data = first.directory / "pairs.arrow"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    assert len(open_cache(corpus_files["valid"], encoder, tmp_path)) == len(first)
    (first.directory / "manifest.json").unlink()
    assert len(open_cache(corpus_files["valid"], encoder, tmp_path)) == len(first)


def test_emotions_are_in_canonical_order():
    found = ordered_emotions(["zeal", "worry", "neutral", "anger", "happiness", "anger"])
    assert found == ("neutral", "happiness", "anger", "worry", "zeal")


def test_truncated_prompts_are_told(tmp_path, encoder, caplog, base):
    text = "many words here " * 60
    raw = {"d": [[{"turn": 1, "speaker": "A", "utterance": text, "emotion": "neutral"}]]}
    path = tmp_path / "long.json"
    path.write_text(json.dumps(raw))
    cache = open_cache(path, PairEncoder(AutoTokenizer.from_pretrained(base), 64), tmp_path / "cache")
    assert np.array_equal(cache.num_tokens, [64])
    assert "1 of 1 prompts are longer than 64 tokens" in caplog.text


def test_coarse_emotions_make_a_cache_of_their_own(
    corpus_files: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    encoder = PairEncoder(AutoTokenizer.from_pretrained(base), 64)
    fine = open_cache(corpus_files["valid"], encoder, tmp_path)
    coarse = open_cache(corpus_files["valid"], encoder, tmp_path, FINE_TO_COARSE)
    assert set(coarse.emotions) == {FINE_TO_COARSE.get(emotion, emotion) for emotion in fine.emotions}
    assert len(fine) == len(coarse)
