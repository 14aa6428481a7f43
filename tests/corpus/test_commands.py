"""The commands `kdecs corpus …`, in this process and, for exit codes and the time of a start, from outside."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import child_environment
from typer.testing import CliRunner

from kdecs.cli import app as cli
from kdecs.corpus.commands import app
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import CorpusError
from kdecs.process import exit_code_of

RECCON = Path(os.environ.get("KDECS_RECCON", Path(__file__).parents[2].parent / "shared" / "reccon"))
needs_reccon = pytest.mark.skipif(not RECCON.is_dir(), reason="the RECCON files are not here (KDECS_RECCON)")
COUNTS = {
    "train": (834, 8206, 7269, 20646, 52419),
    "valid": (47, 493, 347, 838, 3170),
    "test": (225, 2405, 1894, 5330, 15819),
}


def run(*arguments: object, refused: bool = False):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if refused:
        assert isinstance(result.exception, CorpusError), result.output
        assert "\n" not in str(result.exception)
    else:
        assert result.exit_code == 0, (result.output, result.exception)
    return result


@needs_reccon
def test_stats_print_the_counts_table():
    files = [RECCON / f"dailydialog_{split}.json" for split in COUNTS]
    counted = json.loads(run("stats", *files, "--json").stdout)
    keys = ("dialogues", "utterances", "positive_rows", "negative_rows", "pairs_all")
    assert [tuple(file[key] for key in keys) for file in counted] == list(COUNTS.values())
    assert [file["faults"] for file in counted] == [0, 0, 0]
    assert [file["pairs_of_several_spans"] for file in counted] == [237, 19, 120]
    assert [file["targets_caused_outside_alone"] for file in counted] == [163, 4, 24]
    assert [file["emotions"].get("excited", 0) for file in counted] == [2, 0, 1]
    assert [len(file["warnings"]) for file in counted] == [2, 0, 0]
    assert counted[0]["normalised"] == {"angry": 1, "happy": 5, "sad": 3, "surprised": 1}


@needs_reccon
def test_texts_in_two_splits_are_reported_and_dropped():
    files = [RECCON / f"dailydialog_{split}.json" for split in COUNTS]
    result = run("stats", *files, "--drop-cross-split", "--json")
    dropped = [line for line in result.stderr.splitlines() if line.startswith("dropped: ")]
    texts = {line.split("same text as ")[1] for line in dropped}
    assert len(texts) == 11
    assert sum("dailydialog_test" in text for text in texts) == 10
    # One of the eleven texts stands twice in the training file.
    assert len(dropped) == 12
    assert json.loads(result.stdout)[0]["dialogues"] == 834 - 12


@needs_reccon
def test_pairs_print_the_released_row_ids():
    lines = run("pairs", RECCON / "dailydialog_valid.json").stdout.splitlines()
    printed = [(row, json.loads(line)["label"]) for line in lines for row in json.loads(line)["row_ids"]]
    with (RECCON / "fold1_valid_ids.csv").open(newline="", encoding="utf-8") as file:
        released = {(row["id"], int(row["labels"])) for row in csv.DictReader(file)}
    assert len(printed) == len(released)
    assert set(printed) == released


def test_stats_of_the_sample_have_the_contract_keys():
    counted = json.loads(run("stats", bundled_sample("test"), "--json").stdout)
    keys = {
        "file",
        "dialogues",
        "utterances",
        "positive_rows",
        "negative_rows",
        "pairs_all",
        "emotions",
        "faults",
    }
    assert keys <= set(counted[0])
    assert sum(counted[0]["emotions"].values()) == counted[0]["utterances"]
    assert "Table 2" in run("stats", bundled_sample("test")).stdout


def test_stats_sum_several_files():
    files = [str(bundled_sample(split)) for split in ("train", "valid", "test")]
    shown = CliRunner().invoke(app, ["stats", *files]).stdout.splitlines()
    assert shown[1].split() == ["train", "valid", "test", "all"]
    found = {line[:15].strip(): line.replace(",", "").split()[-4:] for line in shown[3:9]}
    for *parts, total in found.values():
        assert sum(map(int, parts)) == int(total)
    assert set(found) >= {"positive rows", "negative rows", "pairs all", "dialogues", "utterances"}
    assert max(map(len, shown[:25])) <= 80


def test_a_tokenizer_without_figures_is_a_usage_error():
    arguments = ["stats", str(bundled_sample("test")), "--tokenizer", "anywhere"]
    assert CliRunner().invoke(app, arguments).exit_code == 2


def test_stats_map_fine_labels_to_coarse_ones(write):
    coarse = json.loads(run("stats", bundled_sample("test"), "--coarse", "--json").stdout)[0]["emotions"]
    assert {"gratitude", "worry", "others"}.isdisjoint(coarse)
    assert "fear" in coarse
    table = write({"worry": "sadness"}, "table.json")
    overridden = json.loads(run("stats", bundled_sample("test"), "--table", table, "--json").stdout)[0][
        "emotions"
    ]
    assert "fear" not in overridden
    assert overridden["sadness"] == coarse["sadness"] + coarse["fear"]


def test_stats_refuse_a_label_outside_the_set(write, valid_document):
    path = write(valid_document)
    run("stats", path, "--labels", "any")
    result = run("verify", path, "--labels", "coarse", refused=True)
    assert "'gratitude'" in str(result.exception)


def test_stats_count_the_sound_part_and_refuse(write, valid_document):
    valid_document["tr_2"][0][0]["emotion"] = "bliss"
    valid_document["tr_2"][0][1]["turn"] = 7
    result = run("stats", write(valid_document), "--json", refused=True)
    counted = json.loads(result.stdout)[0]
    assert (counted["dialogues"], counted["faults"]) == (1, 2)
    assert "tr_2, turn 1, field emotion: found 'bliss'" in str(result.exception)


def test_drop_cross_split_needs_two_files():
    assert (
        CliRunner().invoke(app, ["stats", str(bundled_sample("train")), "--drop-cross-split"]).exit_code == 2
    )


def test_dropping_keeps_what_stands_in_one_split(write, valid_document):
    train = write(valid_document, "train.json")
    test = write({"te_1": valid_document["tr_1"]}, "test.json")
    result = run("stats", train, test, "--drop-cross-split", "--json")
    assert [file["dialogues"] for file in json.loads(result.stdout)] == [1, 1]
    assert "tr_1: the same text as te_1" in result.stderr


def test_convert_puts_a_prefix_before_ids(write, valid_document, tmp_path):
    made = tmp_path / "made.jsonl"
    run("convert", write(valid_document), "--to", "jsonl", "--id-prefix", "mine_", "--output", made)
    assert [json.loads(line)["id"] for line in made.read_text().splitlines()] == ["mine_tr_1", "mine_tr_2"]
    plain = read_corpus(write(valid_document), log=False).dialogues
    found = read_corpus(made, log=False).dialogues
    assert [d.utterances for d in found] == [d.utterances for d in plain]
    assert [d.context_hashes for d in found] == [d.context_hashes for d in plain]


def test_pairs_of_the_worked_file(write, valid_document):
    path = write(valid_document)
    lines = [json.loads(line) for line in run("pairs", path).stdout.splitlines()]
    assert list(lines[0]) == ["id", "dialogue_id", "target", "candidate", "label", "spans", "row_ids"]
    assert lines[1] == {
        "id": "tr_1/2/1",
        "dialogue_id": "tr_1",
        "target": 2,
        "candidate": 1,
        "label": 1,
        "spans": ["We won", "game"],
        "row_ids": [
            "dailydialog_tr_1_utt_2_true_cause_utt_1_span_1",
            "dailydialog_tr_1_utt_2_true_cause_utt_1_span_2",
        ],
    }
    everything = [json.loads(line) for line in run("pairs", path, "--universe", "all").stdout.splitlines()]
    assert len(everything) == 15 + 6
    assert "row_ids" not in everything[0]
    assert '"dialogue_id": "tr_1"' in run("pairs", path, "--part", "iemocap").stdout
    assert "iemocap_tr_1_utt" in run("pairs", path, "--part", "iemocap").stdout


def test_verify_lists_every_fault(write, valid_document):
    valid_document["tr_1"][0][0]["emotion"] = "bliss"
    valid_document["tr_1"][0][1]["expanded emotion cause span"][0] = "not there"
    del valid_document["tr_2"][0][2]["speaker"]
    path = write(valid_document)
    result = run("verify", path, refused=True)
    assert len([line for line in result.stdout.splitlines() if not line.startswith("warning")]) == 3
    assert "3 faults in 1 of 1 files" in str(result.exception)
    faults = json.loads(run("verify", path, "--json", refused=True).stdout)
    assert [(f["file"], f["dialogue"], f["turn"], f["field"]) for f in faults] == [
        (str(path), "tr_1", 1, "emotion"),
        (str(path), "tr_1", 2, "expanded emotion cause span"),
        (str(path), "tr_2", 3, "speaker"),
    ]


def test_verify_warns_of_a_file_without_causes_and_takes_labels_of_ones_own(write, valid_document):
    assert "no utterance has a cause" not in run("verify", write(valid_document)).stdout
    for nested in valid_document.values():
        for utterance in nested[0]:
            for key in [key for key in utterance if key.startswith("expanded")]:
                utterance[key.replace(" ", "_")] = utterance.pop(key)
    path = write(valid_document)
    assert (
        f'warning: {path}: no utterance has a cause; causes are under the keys "expanded emotion cause evidence" and '
        "\"expanded emotion cause span\" (there are 'expanded_emotion_cause_evidence', 'expanded_emotion_cause_span')"
    ) in run("verify", path).stdout
    assert "no utterance" not in run("verify", path, "--unlabelled").stdout
    valid_document["tr_1"][0][0]["emotion"] = "joy"
    path, table = write(valid_document), write({"joy": "happiness"}, "table.json")
    run("verify", path, refused=True)
    assert "valid, 2 dialogues" in run("verify", path, "--table", table).stdout
    run("pairs", path, "--table", table, "--universe", "all")
    assert json.loads(run("stats", path, "--table", table, "--json").stdout)[0]["emotions"]["happiness"] >= 1


def test_verify_passes_the_sample():
    files = [bundled_sample(split) for split in ("train", "valid", "test")]
    assert run("verify", *files).stdout.count(": valid, ") == 3
    run("verify", bundled_sample("unlabelled"), "--unlabelled")
    run("verify", bundled_sample("unlabelled"), refused=True)


def test_commands_start_without_heavy_imports():
    code = (
        "import sys, kdecs.corpus.commands, kdecs.evaluation.commands, kdecs.evaluation.metrics;"
        "heavy = {'torch', 'transformers', 'scipy', 'matplotlib', 'ray', 'mlflow', 'pyarrow'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def kdecs(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command as a separate process."""
    command = [sys.executable, "-m", "kdecs.cli", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def kdecs_here(*arguments: object) -> int:
    """The exit code of the same command in this process, which has imported what it needs."""
    try:
        return exit_code_of(lambda: cli([str(argument) for argument in arguments]))
    except SystemExit as end:
        return int(end.code or 0)


def test_what_is_sound_exits_with_0(capfd):
    done = kdecs("corpus", "verify", bundled_sample("test"))
    assert (done.returncode, done.stderr) == (0, "")
    assert kdecs_here("corpus", "verify", bundled_sample("test")) == 0
    assert capfd.readouterr() == (done.stdout, "")


def test_what_is_refused_exits_with_1_and_one_line(tmp_path, capfd):
    broken = tmp_path / "broken.json"
    broken.write_text('{"tr_1": [[{"turn": 1, "speaker": "A", "utterance": "a", "emotion": "bliss"}]]}')
    for command in ("verify", "stats", "pairs"):
        for path in (broken, tmp_path / "nowhere.json"):
            assert kdecs_here("corpus", command, path) == 1
            error = capfd.readouterr().err
            assert error.startswith("kdecs: error: ") and len(error.splitlines()) == 1
            assert str(path) in error
    done = kdecs("corpus", command, path)
    assert (done.returncode, done.stderr) == (1, error)


def test_a_refusal_is_one_line_where_the_corpus_has_notes_too(tmp_path):
    corpus = tmp_path / "corpus.json"
    corpus.write_text('{"tr_1": [[{"turn": 1, "speaker": "A", "utterance": "a", "emotion": "happy"}]]}')
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("")
    arguments = ("evaluate", "--corpus", corpus, "--predictions", predictions, "--json")
    done = kdecs(*arguments)
    assert (done.returncode, done.stderr) == (0, f"{corpus}: label variants replaced: happy (1)\n")
    predictions.write_text("{")
    done = kdecs(*arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)


def test_usage_errors_exit_with_2():
    assert kdecs("corpus", "verify").returncode == 2
    for arguments in (
        ("corpus", "verify"),
        ("evaluate", "--corpus", bundled_sample("test")),
        ("corpus", "pairs", bundled_sample("test"), "--universe", "none"),
    ):
        assert kdecs_here(*arguments) == 2


HELPS = r"""
import sys
from kdecs.cli import main

for command in sys.argv[1].split(","):
    sys.argv = ["kdecs", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        print(end.code, end="\0")
print(*sys.modules, file=sys.stderr)
"""


def test_help_imports_little():
    """How long a start takes is how much it imports: a time would be the machine's."""
    commands = ["", "corpus", "corpus stats", "evaluate", "compare"]
    done = subprocess.run(
        [sys.executable, "-c", HELPS, ",".join(commands)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *pages, rest = done.stdout.split("\0")
    for command, page in zip(commands, pages, strict=True):
        assert page.endswith("0"), "its exit code"
        assert "xample" in page or " " not in command
    assert not rest
    imported = done.stderr.split()
    assert len(imported) < 800, "590 modules take 0.3 s on an idle machine"
    heavy = {"torch", "transformers", "scipy", "matplotlib", "ray", "mlflow", "pyarrow", "pandas"}
    assert not heavy & set(imported)


@pytest.mark.parametrize(("shell", "code"), [("", 0), (">&-", 1), (">> in.jsonl", 1)])
def test_pairs_are_utf8_under_any_locale_and_never_lost(tmp_path, shell, code):
    utterance = {"turn": 1, "speaker": "A", "utterance": "né 好", "emotion": "happiness"}
    utterance |= {"expanded emotion cause evidence": [1], "expanded emotion cause span": ["né 好"]}
    text = json.dumps({"id": "é", "utterances": [utterance]}, ensure_ascii=False) + "\n"
    (tmp_path / "in.jsonl").write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["bash", "-c", f'"$0" -m kdecs.cli corpus pairs in.jsonl {shell}', sys.executable],
        cwd=tmp_path,
        env={**child_environment(), "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith(b"kdecs: error: ") and done.stderr.count(b"\n") == 1
    else:
        assert json.loads(done.stdout.decode("utf-8"))["spans"] == ["né 好"]
    assert (tmp_path / "in.jsonl").read_text(encoding="utf-8") == text
