"""Exports to ONNX against PyTorch: the same probabilities and predictions, without torch and Transformers."""

import json
import re
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT, change_json, flip_bit, rewrite_manifest, run_python, save_lively_encoder, weights
from typer.testing import CliRunner

from kdecs.artifact import read_manifest
from kdecs.cli import app
from kdecs.config import load_config
from kdecs.corpus.encoding import ENCODERS
from kdecs.corpus.pairs import candidate_pairs
from kdecs.corpus.prompts import PromptVariant
from kdecs.corpus.reading import bundled_sample, iter_dialogues, read_corpus
from kdecs.errors import ArtifactError, DependencyError, DeviceError, KdecsError, ModelError, OutputError
from kdecs.evaluation.metrics import evaluate
from kdecs.models import load_tokenizer
from kdecs.student.config import Outputs, StudentConfig
from kdecs.student.decision import score_pairs
from kdecs.student.model import StudentModel, TorchScorer, load_language_model, student_answer_ids
from kdecs.student.onnx import export
from kdecs.student.onnx.export import Measured, OnnxExport, export_student, largest_difference, measure
from kdecs.student.onnx.graph import export_graph
from kdecs.student.onnx.scoring import OnnxScorer, batch_feeds
from kdecs.student.predict.predictor import Student
from kdecs.student.pyfunc import _load_pyfunc

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dialogues():
    return read_corpus(bundled_sample("valid")).dialogues[:3]


@pytest.fixture(scope="module")
def exported(directory, tmp_path_factory) -> Path:
    """The export of the trained student. Read-only."""
    output = tmp_path_factory.mktemp("export") / "onnx"
    return export_student(OnnxExport(student=directory, output=output))


def random_student(base: Path, head: str, outputs: Outputs) -> StudentModel:
    """A student whose heads and priors say something, unlike those before a training."""
    answers = student_answer_ids(load_tokenizer(base), ["neutral", "happiness", "anger"])
    model = StudentModel(
        load_language_model(base), answers, span_head=head, max_prompt_tokens=256, outputs=outputs
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.heads.values():
            for parameter in module.parameters():
                parameter.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "layout", "head", "outputs"),
    [
        ("roberta", "pair", "pointer", Outputs(spans=False)),
        ("roberta", "tree", "pointer", Outputs()),
        ("bert", "pair", "position", Outputs(priors=True)),
        ("bert", "tree", "position", Outputs(priors=True)),
        ("xlm-roberta", "tree", "pointer", Outputs(cause_by="none")),
        ("distilbert", "tree", "position", Outputs(cause_by="cls", emotions=False, priors=True)),
        ("modernbert", "pair", "pointer", Outputs()),
        ("modernbert", "tree", "pointer", Outputs()),
        ("mpnet", "pair", "pointer", Outputs(cause_by="cls")),
    ],
    ids=str,
)
def test_a_graph_says_what_pytorch_says(family, layout, head, outputs, dialogues, tmp_path):
    """In batches of other sizes than the one that it was traced with, down to one pair."""
    base = save_lively_encoder(tmp_path / "base", family)
    model, tokenizer = random_student(base, head, outputs), load_tokenizer(base)
    variant = PromptVariant(
        has_connective=outputs.cause_by == "connective", given_emotions=None if outputs.emotions else {}
    )
    encoder = ENCODERS[layout](tokenizer, 200, variant)
    pairs = list(encoder.encode([pair for dialogue in dialogues for pair in candidate_pairs(dialogue)]))
    scorer = TorchScorer(model, pad_id=tokenizer.pad_token_id, device=CPU)
    expected = list(scorer.batches(pairs, 4096))
    alone = list(scorer.batches(pairs[:1], 4096))
    export_graph(model, batch_feeds(pairs[:9], tokenizer.pad_token_id), tmp_path / "model.onnx")
    graph = OnnxScorer(tmp_path / "model.onnx", tokenizer.pad_token_id, threads=1)
    assert len(expected[0][1]) == 5 and [part is None for part in expected[0][1]] == [
        part is None for part in next(iter(graph.batches(pairs, 4096)))[1]
    ]
    for tokens in (4096, 300):
        assert largest_difference(pairs, expected, graph.batches(pairs, tokens)) < 1e-5
    assert largest_difference(pairs[:1], alone, graph.batches(pairs[:1], 4096)) < 1e-5


def test_the_comparison_sees_every_probability(directory, dialogues):
    student = Student.from_pretrained(directory)
    pairs = list(student.encoder.encode(candidate_pairs(dialogues[0])))
    batches = list(student.scorer.batches(pairs, 512))
    assert largest_difference(pairs, batches, batches) == 0
    for name in ("emotion_BE", "connective_BA", "start_BS", "end_BS"):
        changed = [
            (rows, logits._replace(**{name: getattr(logits, name).copy()})) for rows, logits in batches
        ]
        getattr(changed[-1][1], name)[-1, 0] += 0.1
        assert largest_difference(pairs, batches, changed) > 1e-3, name
    getattr(changed[-1][1], name)[-1, 0] = np.nan
    assert np.isnan(largest_difference(pairs, changed, batches))


def test_an_export_predicts_as_its_student(directory, exported, dialogues):
    student, export = Student.from_pretrained(directory), Student.from_pretrained(exported, device="auto")
    expected = [item for _, items in student.stream(dialogues) for item in items]
    found = [item for _, items in export.stream(dialogues) for item in items]
    assert [item.prediction for item in found] == [item.prediction for item in expected]
    assert [item.span_range for item in found] == [item.span_range for item in expected]
    np.testing.assert_allclose([i.score for i in found], [i.score for i in expected], atol=1e-4)
    details = read_manifest(exported, "student-onnx").details
    assert details["largest_difference"] < 1e-4
    assert details["student"] == read_manifest(directory, "student").details


def brought_by(names: list[str]) -> set[str]:
    """The distributions that an installation of these brings along, with them."""
    found: set[str] = set()
    open_names = [canonicalize_name(name) for name in names]
    while open_names:
        name = open_names.pop()
        if name not in found:
            found.add(name)
            wanted = map(Requirement, metadata.requires(name) or ())
            open_names += [
                canonicalize_name(r.name) for r in wanted if not r.marker or r.marker.evaluate({"extra": ""})
            ]
    return found


ALONE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if (top := name.partition(".")[0]) in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=top)
missing = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Missing())
from kdecs.cli import main
main()
"""


def test_an_export_predicts_with_the_packages_that_the_page_names(exported, directory, tmp_path):
    page = (ROOT / "docs" / "predict-and-serve.md").read_text("utf-8")
    [names] = re.findall(r"(?m)^pip install (onnxruntime .*)$", page)
    brought = brought_by(names.split()) | {"kdecs"}
    assert not brought & {"torch", "transformers"}
    missing = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not brought.intersection(map(canonicalize_name, owners))
    }
    assert missing > {"torch", "transformers", "scipy", "pyarrow"}
    output, sample = tmp_path / "out.jsonl", ROOT / "kdecs" / "corpus" / "sample" / "unlabelled.json"
    command = ["-c", ALONE, ",".join(missing), "predict", "--input", sample, "--output", output, "--student"]
    done = run_python(*command, exported)
    assert done.returncode == 0, done.stderr
    expected = Student.from_pretrained(directory).predict(iter_dialogues(sample, labelled=False))
    found = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [(row["target"], row["candidate"], row["span"]) for row in found] == [
        (pair.target, pair.candidate, pair.span) for pair in expected
    ]
    done = run_python(*command, directory)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "needs PyTorch and Transformers, and " in done.stderr


def test_an_export_decides_by_argmax_as_its_student(directory, exported, dialogues, corpus_files):
    """The card decides, which the export has from the student; causes are those of the largest logits."""
    pairs = [pair for dialogue in dialogues for pair in candidate_pairs(dialogue)]
    found, students = [], []
    for folder in (directory, exported):
        one = Student.from_pretrained(folder)
        # A student that is never neutral, so that argmax alone decides.
        emotions = tuple("fear" if emotion == "neutral" else emotion for emotion in one.card.emotions)
        card = one.card.model_copy(update={"cause_decision": "argmax", "emotions": emotions})
        encoded = list(one.encoder.encode(pairs))
        scores = score_pairs(one.scorer.batches(encoded, 512), len(pairs), card.outputs, len(emotions))
        predicted = Student(one.scorer, one.tokenizer, card).detail(pairs)
        assert [item.prediction.is_cause for item in predicted] == scores.is_likeliest_P.tolist()
        by_threshold = Student(
            one.scorer, one.tokenizer, card.model_copy(update={"cause_decision": "threshold"})
        )
        assert [item.score for item in by_threshold.detail(pairs)] == [item.score for item in predicted]
        found.append([item.prediction for item in predicted])
        students.append(Student(one.scorer, one.tokenizer, card))
    assert found[0] == found[1]
    # Measuring, as an export to int8 does, chooses no threshold for it.
    corpus, config = read_corpus(corpus_files["valid"]), load_config(StudentConfig, directory / "config.json")
    measured, threshold = measure(students[1], students[0], corpus, config, None)
    assert threshold == students[0].card.threshold
    expected = evaluate(corpus, students[0].predict_pairs(corpus), universe="fold1")["macro_f1"]
    assert measured.macro_f1 == measured.macro_f1_float32 == expected


def test_an_export_is_served(exported, student):
    request = [{"utterances": [{"speaker": "A", "utterance": "I got the job !"}]}]
    [answer] = _load_pyfunc(str(exported)).predict(request)
    assert json.loads(answer)[0]["target"] == 1


def test_the_command_writes_once(exported, directory, tmp_path):
    output = tmp_path / "onnx"
    command = ["student", "export", str(directory), "--format", "onnx", "--output", str(output)]
    first = CliRunner().invoke(app, command)
    assert (first.exit_code, first.stdout) == (0, f"{output}: exported\n")
    made = (output / "manifest.json").read_bytes()
    again = CliRunner().invoke(app, command)
    assert again.stdout.startswith(f"{output}: export complete, skipped")
    assert (output / "manifest.json").read_bytes() == made == (exported / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match="finished student-onnx directory of another config"):
        export_student(OnnxExport(student=directory, output=output, precision="int8"))


def test_an_export_that_differs_is_not_written(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "largest_difference", lambda *arguments: float("nan"))
    with pytest.raises(ModelError, match=r"is nan away from PyTorch's, expected at most 0\.0001"):
        export_student(OnnxExport(student=directory, output=tmp_path / "onnx"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="lies inside"):
        export_student(OnnxExport(student=directory, output=directory / "onnx"))
    with pytest.raises(
        ArtifactError, match="no such directory, expected the directory of a finished student"
    ):
        export_student(OnnxExport(student=tmp_path / "nowhere", output=tmp_path / "onnx"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda"}, DeviceError, "device cuda: .* runs on the CPU; use device cpu"),
        ({"precision": "bfloat16"}, ModelError, "precision bfloat16: .* keeps its own precision"),
    ],
)
def test_what_an_export_cannot_do(exported, options, error, message):
    with pytest.raises(error, match=message):
        Student.from_pretrained(exported, **options)


def damaged(folder: Path) -> None:
    flip_bit(folder / "model.onnx")


def forged(name: str, content: bytes):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)
        rewrite_manifest(folder)

    return damage


def graph_that_reads(location: str) -> bytes:
    """A graph whose weights are in a file elsewhere."""
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    node = onnx.helper.make_node("Identity", ["w"], ["y"])
    output = onnx.helper.make_tensor_value_info("y", 1, [4])
    graph = onnx.helper.make_graph([node], "g", [], [output], [weight])
    opset = onnx.helper.make_opsetid("", 18)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def card_of_another(folder: Path) -> None:
    change_json(folder / "onnx.json", precision="int4")
    rewrite_manifest(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged, "model.onnx: sha256 .*the file is damaged"),
        (lambda folder: (folder / "model.onnx.data").write_bytes(b"x"), "does not list this file"),
        (forged("model.onnx", b"no graph"), "model.onnx: ONNX Runtime cannot load it"),
        (forged("model.onnx", graph_that_reads("../secret")), "model.onnx: ONNX Runtime cannot load it"),
        (forged("tokenizer.json", b"{}"), "tokenizer .*cannot be loaded"),
        (
            card_of_another,
            "onnx.json: precision: Input should be 'float32' or 'int8'; export the student again",
        ),
        (forged("onnx.json", b"["), "onnx.json: .*export the student again"),
    ],
)
def test_a_damaged_or_forged_export_is_one_line(exported, tmp_path, damage, message):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    damage(folder)
    with pytest.raises(KdecsError, match=message) as caught:
        Student.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(exported, directory, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r'needs onnxruntime.*pip install "kdecs\[onnx\]"'):
        Student.from_pretrained(exported)
    with pytest.raises(DependencyError, match=r"exporting needs onnxruntime.*kdecs\[onnx-export\]"):
        export_student(OnnxExport(student=directory, output=tmp_path / "onnx"))


def test_int8_is_measured_and_refused_if_it_loses_too_much(directory, corpus_files, tmp_path, monkeypatch):
    config = OnnxExport(student=directory, output=tmp_path / "int8", precision="int8")
    monkeypatch.setattr(export, "measure", lambda *arguments: (Measured(60.0, 61.0, 20.0, 30.0), 0.5))
    with pytest.raises(ModelError, match=r"loses 1\.00 points of macro F1, more than 0\.5 and it is slower"):
        export_student(config)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    export_student(config, force=True)
    details = read_manifest(config.output).details
    assert (
        details["precision"] == "int8" and details["largest_difference"] < 1e-4
    )  # that of the float32 graph
    assert details["measured"]["pairs_per_s"] > 0
    student = Student.from_pretrained(config.output)
    held = {tensor.name: tensor for tensor in onnx.load(config.output / "model.onnx").graph.initializer}
    [words] = [tensor for name, tensor in held.items() if name.endswith(".int8")]
    [scales] = [numpy_helper.to_array(tensor) for name, tensor in held.items() if name.endswith(".scales")]
    expected = weights(directory)["roberta.embeddings.word_embeddings.weight"].numpy()
    # Each word vector is as near as a row's scale allows.
    assert (np.abs(numpy_helper.to_array(words) * scales - expected) <= scales / 2 + 1e-7).all()
    assert any(
        tensor.data_type == onnx.TensorProto.INT8 and "quantized" in name for name, tensor in held.items()
    )
    corpus = read_corpus(corpus_files["valid"])
    # Nothing but the threshold is new in the card, and with it the export scores what its manifest says.
    assert student.card.threshold == details["measured"]["threshold"]
    original = Student.from_pretrained(directory)
    assert student.card.model_copy(update={"threshold": original.card.threshold}) == original.card
    # Another file is measured on, but does not decide what the student predicts.
    other = OnnxExport(student=directory, output=tmp_path / "other", precision="int8")
    export_student(other, corpus_file=corpus_files["train"], force=True)
    assert Student.from_pretrained(other.output).card == original.card
    for one, key in ((student, "macro_f1"), (original, "macro_f1_float32")):
        # By dialogue, as they were measured: int8 rounds by the largest number of a batch.
        parts = [replace(corpus, dialogues=(dialogue,)) for dialogue in corpus.dialogues]
        predictions = {pair: found for part in parts for pair, found in one.predict_pairs(part).items()}
        assert evaluate(corpus, predictions, universe="fold1")["macro_f1"] == details["measured"][key]
