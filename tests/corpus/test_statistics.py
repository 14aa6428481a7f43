import builtins

import pytest
from typer.testing import CliRunner

from kdecs.cli import app
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.splits import DuplicateFinder
from kdecs.corpus.statistics import (
    cause_distances,
    display_names,
    prompt_tokens,
    prompt_words,
    statistics_of,
    write_plots,
)
from kdecs.errors import DependencyError, ModelError


def test_statistics_of_the_worked_file(write, valid_document):
    counted = statistics_of(read_corpus(write(valid_document)))
    assert (counted.dialogues, counted.utterances, counted.pairs_all) == (2, 8, 21)
    # tr_1: targets 1, 2, 4, 5; tr_2: 1 (one cause, one in the future) and 2 (an empty list of evidence).
    assert (counted.positive_rows, counted.negative_rows) == (1 + 3 + 2 + 1, 0 + 0 + 2 + 5 + 2)
    assert counted.pairs_of_several_spans == 1
    assert counted.targets_caused_outside_alone == 1
    assert list(counted.emotions) == sorted(counted.emotions)
    assert set(counted.emotions.values()) == {1}


def test_distances_and_words(write, valid_document):
    corpus = read_corpus(write(valid_document))
    assert cause_distances(corpus) == {0: 4, 1: 3}
    words = prompt_words(corpus)
    assert len(words) == 1 + 2 + 4 + 5 + 1 + 2
    prompt = (
        "1 B feels <mask> and says We won the game !. <mask> 1 B says We won the game !. "
        "The causal span start at <mask>, end at <mask>."
    )
    assert words[0] == len(prompt.split())


def test_prompts_are_counted_in_tokens_of_the_model_that_reads_them(write, valid_document):
    class Characters:
        """A tokenizer of characters, with a start token."""

        sep_token = "\n"

        def __init__(self, mask_token):
            self.mask_token = mask_token

        def __call__(self, texts, verbose):
            return {"input_ids": [[0, *map(ord, text)] for text in texts]}

    corpus = read_corpus(write({"tr_1": [valid_document["tr_1"][0][:1]]}))
    text = "We won the game !"
    student = f"1 B feels # and says {text}. # 1 B says {text}. The causal span start at #, end at #."
    assert prompt_tokens(corpus, Characters("#")) == [1 + len(student)]
    teacher = f"1 B feels happiness and says {text}. 1 B says {text}. The connective word between 1 and 1 is"
    assert prompt_tokens(corpus, Characters(None)) == [1 + len(teacher)]


def test_a_tokenizer_that_is_not_there_is_one_clear_line(tmp_path):
    pytest.importorskip("transformers")
    arguments = ["corpus", "stats", str(bundled_sample("test")), "--plots", str(tmp_path), "--tokenizer"]
    for directory in (tmp_path, tmp_path / "nowhere"):
        refusal = CliRunner().invoke(app, [*arguments, str(directory)]).exception
        assert isinstance(refusal, ModelError)
        assert str(directory) in str(refusal) and "\n" not in str(refusal)


def test_files_of_one_name_stay_apart(tmp_path):
    paths = [tmp_path / "a" / "train.json", tmp_path / "b" / "train.json", tmp_path / "test.json"]
    assert display_names(paths) == [str(paths[0]), str(paths[1]), "test"]


def test_the_sample_splits_share_no_text():
    finder = DuplicateFinder()
    for split in ("train", "valid", "test"):
        for dialogue in read_corpus(bundled_sample(split)).dialogues:
            finder.add(split, dialogue)
    assert finder.duplicates == []


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    corpora = [read_corpus(bundled_sample(split)) for split in ("train", "test")]
    written = write_plots(corpora, tmp_path / "plots")
    assert [path.name for path in written] == ["emotions.png", "cause_distance.png", "prompt_lengths.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_plots_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DependencyError, match=r"kdecs\[sweep\]"):
        write_plots([read_corpus(bundled_sample("test"))], tmp_path)
