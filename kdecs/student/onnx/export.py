"""`kdecs student export`: a student as a graph of ONNX, in float32 or int8, that has shown what it is worth.

The story: the graph is made and compared with PyTorch on the bundled dialogues. For int8 its weights are quantised, and
both graphs predict a labelled file. Only an export that passes becomes a directory of kind student-onnx.
"""

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kdecs.artifact import (
    check_output,
    install_files,
    is_complete,
    read_manifest,
    read_verified_manifest,
    temporary_folder,
    write_json,
    write_manifest,
)
from kdecs.config import (
    CONFIG_NAME,
    Config,
    InputPath,
    OutputPath,
    config_hash,
    input_checksums,
    load_config,
)
from kdecs.corpus.encoding import ENCODERS, EncodedPair
from kdecs.corpus.pairs import Ints, Pair, candidate_pairs, pairs_of
from kdecs.corpus.prompts import history_separator
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Corpus
from kdecs.corpus.splits import read_split
from kdecs.errors import ConfigError, ModelError
from kdecs.evaluation.metrics import evaluate
from kdecs.output import refuse_inputs
from kdecs.process import say
from kdecs.student.config import CARD_NAME, StudentCard, StudentConfig
from kdecs.student.decision import Logits, choose_threshold, log_softmax, pair_gains
from kdecs.student.model import load_scorer
from kdecs.student.onnx.graph import OPSET, export_graph
from kdecs.student.onnx.scoring import (
    GRAPH_NAME,
    ONNX_CARD_NAME,
    TOKENIZER_NAME,
    OnnxCard,
    OnnxScorer,
    Precision,
    batch_feeds,
    require_packages,
)
from kdecs.student.predict.predictor import Student
from kdecs.student.predict.streaming import PairPrediction

LARGEST_DIFFERENCE = 1e-4
"""Of a probability, between a float32 graph and PyTorch."""
MOST_F1_LOST = 0.5
"""Points of macro F1 that int8 may cost."""
_DIALOGUES_COMPARED = 2
_TOKENS_COMPARED = (4096, 256)  # per batch: the sizes of the graph's inputs must not be fixed
_LARGE_TABLE = 512  # rows: word vectors, and the positions of some encoders
_MAX_GRAPH_BYTES = 2 << 30  # of one file in protobuf
_PACKAGES = ("onnx", "onnxruntime", "torch", "transformers")


class OnnxExport(Config):
    """An export: its config hash says which student it is of, in which precision."""

    method_versions: ClassVar[dict[str, int]] = {"graph": 2, "opset": OPSET}
    student: InputPath
    output: OutputPath
    precision: Precision = "float32"


@dataclass(frozen=True)
class Measured:
    """An export beside the float32 graph: macro F1 in percent (fold1, protocol reccon), and pairs per second.

    For the task ecpe, macro F1 is that of utterances.
    """

    macro_f1: float
    macro_f1_float32: float
    pairs_per_s: float
    pairs_per_s_float32: float

    def __str__(self) -> str:
        return (
            f"macro F1 {self.macro_f1:.2f} (float32 {self.macro_f1_float32:.2f}), {self.pairs_per_s:.1f} pairs per "
            f"second (float32 {self.pairs_per_s_float32:.1f})"
        )

    @property
    def faults(self) -> list[str]:
        """Why the export is not worth it, in words."""
        lost = self.macro_f1_float32 - self.macro_f1
        found = []
        if lost > MOST_F1_LOST:
            found.append(f"it loses {lost:.2f} points of macro F1, more than {MOST_F1_LOST}")
        if self.pairs_per_s < self.pairs_per_s_float32:
            found.append("it is slower than float32 on this machine")
        return found


def export_student(config: OnnxExport, *, corpus_file: Path | None = None, force: bool = False) -> Path:
    """Export a student and return the directory; what is complete already is skipped.

    int8 is measured on a labelled file, by default the one that the student was validated on.

    Raises ModelError if the graph differs from PyTorch, or if int8 loses too much and it is not forced;
    DependencyError without the packages for exporting; ConfigError if int8 has no file to be measured on; and what
    loading a student raises.
    """
    read_manifest(
        config.student, "student"
    )  # names a directory that holds none, which the hash would call a key
    refuse_inputs(config.output, [config.student, corpus_file], is_directory=True)
    digest = config_hash(config)
    check_output(config.output, "student-onnx", digest)
    if is_complete(config.output, "student-onnx", digest):
        say(f"{config.output}: export complete, skipped")
        return config.output
    require_packages(f"{config.student}: exporting", ("onnx", "onnxruntime"), "onnx-export")
    manifest = read_verified_manifest(config.student, "student")
    trained, corpus = None, None
    if config.precision != "float32":
        trained = load_config(StudentConfig, config.student / CONFIG_NAME)
        corpus = _labelled_corpus(trained, corpus_file)
    scorer, tokenizer, card = load_scorer(config.student, device="cpu", precision="float32")
    if (size := sum(parameter.nbytes for parameter in scorer.model.parameters())) > _MAX_GRAPH_BYTES:
        raise ModelError(
            f"{config.student}: its weights have {size} bytes, more than the 2 GiB that an ONNX file holds; export a "
            "smaller student"
        )
    onnx_card = OnnxCard(
        precision=config.precision,
        mask_token=tokenizer.mask_token,
        separator=history_separator(tokenizer),
        pad_id=tokenizer.pad_token_id or 0,
    )
    details: dict[str, Any] = {
        "precision": config.precision,
        "opset": OPSET,
        "versions": {name: version(name) for name in _PACKAGES},
        "student": manifest.details,
    }
    with temporary_folder(config.output) as made:
        pairs = _sample_pairs(tokenizer, card)
        expected = list(scorer.batches(pairs, _TOKENS_COMPARED[0]))
        graph = made / GRAPH_NAME
        export_graph(scorer.model, batch_feeds(pairs, onnx_card.pad_id), graph)
        float32 = OnnxScorer(graph, onnx_card.pad_id)
        difference = float(
            np.max([largest_difference(pairs, expected, float32.batches(pairs, n)) for n in _TOKENS_COMPARED])
        )
        if not difference <= LARGEST_DIFFERENCE:  # NaN is not, either
            raise ModelError(
                f"{config.student}: a probability of its graph is {difference:.2g} away from PyTorch's, expected at "
                f"most {LARGEST_DIFFERENCE:g}; this architecture cannot be exported"
            )
        details["largest_difference"] = difference
        if trained is not None and corpus is not None:
            quantise(graph)
            measured, threshold = measure(
                Student(OnnxScorer(graph, onnx_card.pad_id), tokenizer, card),
                Student(float32, tokenizer, card),
                corpus,
                trained,
                # Chosen on a file that is small or unlike the training's, a threshold could ruin the student.
                None if corpus_file is None else card.threshold,
            )
            card = card.model_copy(update={"threshold": threshold})
            say(f"{config.output}: {measured}")
            if faults := " and ".join(measured.faults):
                if not force:
                    raise ModelError(
                        f"{config.student}: int8 does not pay: {faults}; --force exports it all the same"
                    )
                say(f"{config.output}: exported all the same: {faults}")
            details["measured"] = asdict(measured) | {"threshold": threshold}
        tokenizer.backend_tokenizer.save(str(made / TOKENIZER_NAME))
        write_json(made / CARD_NAME, card.as_json())
        write_json(made / ONNX_CARD_NAME, onnx_card.model_dump(mode="json"))
        names = install_files(made, config.output)
    write_manifest(
        config.output,
        "student-onnx",
        config_hash=digest,
        inputs=input_checksums(student=config.student),
        files=names,
        details=details,
    )
    return config.output


def _labelled_corpus(trained: StudentConfig, corpus_file: Path | None) -> Corpus:
    """The file to measure on, its emotions mapped as in the student's training."""
    path = corpus_file or trained.corpus.valid
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file, but int8 is measured on a labelled file; name one with --corpus FILE"
        )
    return read_split(trained.corpus, path)


def _sample_pairs(tokenizer: Any, card: StudentCard) -> list[EncodedPair]:
    """Pairs of the bundled dialogues as the student reads them: several lengths, distances and targets."""
    dialogues = read_corpus(bundled_sample("valid")).dialogues[:_DIALOGUES_COMPARED]
    encoder = ENCODERS[card.layout](tokenizer, card.max_prompt_tokens, card.prompt)
    return list(
        encoder.encode(
            [
                pair
                for dialogue in dialogues
                for pair in candidate_pairs(dialogue, after=card.candidates_after)
            ]
        )
    )


def quantise(graph: Path) -> None:
    """Replace a float32 graph by its int8 form: matrices by ONNX Runtime's dynamic quantisation, word vectors by row.

    Weights take 7 of the 8 bits: a processor without VNNI adds two products in 16 bits, which overflow silently, and
    the same file has to be right on every processor.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(graph)
    _quantise_word_vectors(model)
    onnx.save(model, graph)
    quantised = graph.with_suffix(".int8")
    with _quiet():
        quantize_dynamic(
            graph,
            quantised,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
    quantised.replace(graph)


def _quantise_word_vectors(model: Any) -> None:
    """Keep each row of a large look-up table as int8 and one scale. ONNX Runtime would take one scale for all rows."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = []
    tables = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or len(table.dims) != 2 or table.dims[0] < _LARGE_TABLE:
            nodes.append(node)
            continue
        name, rows = table.name, numpy_helper.to_array(table)
        # A row of zeros, which padding may have, would have the scale 0.
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
        model.graph.initializer.remove(table)
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(np.rint(rows / scales).astype(np.int8), f"{name}.int8"),
                numpy_helper.from_array(scales.astype(np.float32), f"{name}.scales"),
            ]
        )
        ids, output = node.input[1], node.output[0]
        nodes += [
            helper.make_node("Gather", [f"{name}.int8", ids], [f"{output}.int8"]),
            helper.make_node("Cast", [f"{output}.int8"], [f"{output}.float"], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}.scales", ids], [f"{output}.scales"]),
            helper.make_node("Mul", [f"{output}.float", f"{output}.scales"], [output]),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: ONNX Runtime advises on the root logger to prepare the graph, which loading does anyway, and a
    student says for each dialogue how many prompts it cuts.
    """
    before, handler = logging.root.manager.disable, logging.NullHandler()
    logging.disable(logging.WARNING)
    logging.root.addHandler(handler)  # a message on a root logger without handlers gives it one for good
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        logging.disable(before)


def measure(
    student: Student,
    float32: Student,
    corpus: Corpus,
    trained: StudentConfig,
    threshold: float | None,
) -> tuple[Measured, float]:
    """Both students on a labelled corpus, dialogue by dialogue in turn, and the threshold of causes for the first.

    Another precision shifts all scores a little, so with None the threshold is chosen anew, as the training chose it.
    A student that decides by argmax has none to choose.
    """
    decides_by_argmax = student.card.chosen_threshold is None
    # Under a threshold of 0 each pair of an emotional target has a span, so that any other can be tried afterwards.
    any_cause = student.card.model_copy(update={"threshold": 0.0})
    students, seconds = (Student(student.scorer, student.tokenizer, any_cause), float32), [0.0, 0.0]
    pairs: list[Pair] = []
    found: tuple[list[PairPrediction], ...] = ([], [])
    for number, dialogue in enumerate(corpus.dialogues):
        some = pairs_of(dialogue, "fold1+neutral")
        pairs += some
        # Alternately, so that what else runs on the machine slows both.
        for side in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            with _quiet():
                found[side].extend(students[side].detail(some))
            seconds[side] += time.perf_counter() - began
    # Pairs (i, i) of neutral targets serve emotion accuracy alone.
    scored = [
        (pair, item)
        for pair, item in zip(pairs, found[0], strict=True)
        if pair.dialogue.utterances[pair.target - 1].evidence is not None
    ]
    if decides_by_argmax:
        threshold = student.card.threshold
    elif threshold is None:
        threshold, _ = choose_threshold(
            pair_gains(
                np.array([item.score for _, item in scored], dtype=np.float32),
                [item.prediction.emotion for _, item in scored],
                [pair.spans for pair, _ in scored],
                [item.prediction.span for _, item in scored],
                "utterance" if trained.task == "ecpe" else trained.threshold_for,
            )
        )
    decided = [
        item.prediction
        if decides_by_argmax or item.score >= threshold
        else replace(item.prediction, is_cause=False, span="")
        for item in found[0]
    ]
    key = "utterance_macro_f1" if trained.task == "ecpe" else "macro_f1"
    macro = [
        evaluate(corpus, {prediction.key: prediction for prediction in predictions}, universe="fold1")[key]
        for predictions in (decided, [item.prediction for item in found[1]])
    ]
    speeds = [len(pairs) / max(spent, 1e-9) for spent in seconds]
    return Measured(*macro, *speeds), threshold


def largest_difference(
    pairs: list[EncodedPair], left: Iterable[tuple[Ints, Logits]], right: Iterable[tuple[Ints, Logits]]
) -> float:
    """The largest difference of a probability (emotion, connective, first or last token) between two engines."""
    ours, theirs = _probabilities(pairs, left), _probabilities(pairs, right)
    differences = [np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)]
    return float(np.max(differences))  # NaN, which a graph may give, stays NaN


def _probabilities(
    pairs: list[EncodedPair], batches: Iterable[tuple[Ints, Logits]]
) -> list[npt.NDArray[np.float32]]:
    """All probabilities of each pair, in one array per pair."""
    found: dict[int, npt.NDArray[np.float32]] = {}
    for rows, logits in batches:
        words, spans = (logits.emotion_BE, logits.connective_BA, logits.classifier_B2), logits[2:4]
        for place, row in enumerate(rows.tolist()):
            num_places = len(pairs[row].candidate_offsets) + 1  # the batch pads to its longest
            given = [part[place] for part in words if part is not None]
            given += [part[place, :num_places] for part in spans if part is not None]
            found[row] = np.exp(np.concatenate([log_softmax(part) for part in given]))
    return [found[row] for row in range(len(pairs))]
