"""Score pairs with a finished teacher: the logits that an export writes as soft labels.

`TeacherScorer.load` puts a whole teacher on one device. `load_partitioned` is for a teacher that no device can hold:
its parameters are partitioned over the ranks of a launch (ZeRO-3 inference), and all ranks together gather each layer
for the moment of its forward. Ranks still claim shards independently of each other; `Lockstep` only makes them run the
same number of forwards.

Shapes: n pairs, P prompts of a batch, A answer words, V vocabulary, K top logits.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from kdecs.artifact import MANIFEST_NAME, Manifest, read_verified_manifest
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import Pair
from kdecs.errors import ArtifactError, ConfigError, ModelError, Stopped, TrainingError
from kdecs.process import StopSignal, refusing
from kdecs.runtime import Runtime, import_deepspeed
from kdecs.teacher.data import fixed_batches, is_padded, make_units
from kdecs.teacher.families import EncodedPrompt, language_model
from kdecs.teacher.network import TeacherNetwork, are_close
from kdecs.teacher.product import lineage_of, load_trained, read_teacher_config

Forward = Callable[[Sequence[EncodedPrompt]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TeacherScorer:
    """A loaded teacher. How pairs are batched depends on the pairs alone, so scores never depend on the ranks.

    `forward` replaces `TeacherNetwork.answers_and_rest`, where the ranks have to run it together.
    """

    network: TeacherNetwork
    manifest: Manifest
    lineage: dict[str, str]
    micro_batch_tokens: int
    answer_words: tuple[str, ...] = CONNECTIVES
    forward: Forward | None = None

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        runtime: Runtime,
        dtype: str,
        micro_batch_tokens: int,
        base: str | None = None,
    ) -> "TeacherScorer":
        """Load a finished teacher directory (base and adapter, or the fully tuned model) onto this rank's device.

        `base` names the base model if it has moved since the training; its checksum must be the same.

        Raises ArtifactError for an unfinished directory or a different base, ModelError if the weights do not load.
        """
        manifest = read_verified_manifest(directory, "teacher")
        if "base" not in manifest.inputs or "batching" not in manifest.details:
            raise ArtifactError(
                f"{directory / MANIFEST_NAME}: names no base or no batching, which each teacher has; "
                "train or import the teacher again"
            )
        config = read_teacher_config(directory)
        family, network = load_trained(directory, config, dtype=dtype, device=runtime.device, base=base)
        use_tree = manifest.details["batching"] == "tree"  # the training has checked that the tree is exact
        if dtype == "float32" and not config.model.load_in_4bit:
            with refusing(f"{directory}: the adapter cannot be added to its base's weights"):
                network = fold_adapter(network)
        teacher = TeacherNetwork(family, network, use_tree=use_tree, device=runtime.device)
        lineage = lineage_of(directory, manifest, config, family, dtype=dtype)
        teacher = teacher.to(runtime.device).eval()
        # Settings that load may still not run, which a first prompt shows. Partitioned, no rank can run it yet.
        if not _is_partitioned(network):
            with refusing(f"{directory}: does not run as a teacher"), torch.inference_mode():
                in_trees, teacher.use_tree = (
                    teacher.use_tree,
                    False,
                )  # a tree's attention would be compiled for it
                teacher.answers_and_rest([_dummy_prompt()])
                teacher.use_tree = in_trees
        return cls(teacher, manifest, lineage, micro_batch_tokens)

    @property
    def tokenizer_sha256(self) -> str:
        """Checksum over the names and contents of the tokenizer's files: what the top logits' token ids refer to."""
        return self.lineage["tokenizer"]

    def score(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
        """Raw logits (n, A) and log-probability mass (n,) of the rest, float32, in the order of `pairs`.

        Keep the pairs of a dialogue next to each other: they share a prefix tree.
        """
        logits, log_rest, *_ = self.score_with_top(pairs, 0)
        return logits, log_rest

    @torch.inference_mode()
    def score_with_top(
        self, pairs: Sequence[Pair], top_k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Like `score`, plus ids (n, K) int32 and raw logits (n, K) float32 of the K largest logits, largest first.

        Top logits serve students with the teacher's own tokenizer only: the ids mean nothing to any other. They are
        read where the head computes them, in the teacher's dtype.
        """
        family, use_tree = self.network.family, self.network.use_tree
        forward = self.forward or self.network.answers_and_rest
        prompts = [family.encode(pair) for pair in pairs]
        units = make_units(
            family,
            pairs,
            prompts,
            use_tree=use_tree,
            max_tokens=self.micro_batch_tokens,
            max_pairs=len(pairs),
        )
        logits = np.zeros((len(pairs), len(self.answer_words)), dtype=np.float32)
        log_rest = np.zeros(len(pairs), dtype=np.float32)
        top_ids = np.zeros((len(pairs), top_k), dtype=np.int32)
        top_logits = np.zeros((len(pairs), top_k), dtype=np.float32)
        with self._top_of_head(top_k) as captured:
            padded = not use_tree and is_padded(prompts)
            for batch in fixed_batches(units, micro_batch_tokens=self.micro_batch_tokens, padded=padded):
                captured.clear()
                indices = list(batch.pairs)
                answers_PA, rest_P = forward([prompts[n] for n in indices])
                logits[indices] = answers_PA.cpu().numpy()
                log_rest[indices] = rest_P.cpu().numpy()
                if top_k:
                    ((values_PK, ids_PK),) = captured
                    top_ids[indices] = ids_PK.cpu().numpy()
                    top_logits[indices] = values_PK.cpu().numpy()
        return logits, log_rest, top_ids, top_logits

    def check_top_k(self, top_k: int) -> None:
        """Raise ConfigError if `top_k` exceeds the vocabulary."""
        vocabulary = len(self.network.family.tokenizer)
        if top_k > vocabulary:
            raise ConfigError(
                f"top_k: found {top_k}, but the teacher's vocabulary has only {vocabulary} tokens; set a smaller top_k"
            )

    @contextmanager
    def _top_of_head(self, top_k: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Collect values and ids (P, K) when the head runs, so that only K of the V logits outlive the forward.

        Clear the list before each forward.
        """
        captured: list[tuple[Tensor, Tensor]] = []
        if not top_k:
            yield captured
            return

        def keep(module: nn.Module, inputs: object, logits_PV: Tensor) -> None:
            del module, inputs
            # The head may run a second time for the answer words: whole if it is partitioned, over their rows alone if
            # it is a masked model's. Only the first run always has the whole vocabulary.
            if not captured:
                values_PK, ids_PK = torch.topk(logits_PV.float(), top_k, dim=-1)
                captured.append((values_PK, ids_PK))

        head = language_model(self.network.network).get_output_embeddings()
        handle = head.register_forward_hook(keep)
        try:
            yield captured
        finally:
            handle.remove()


def fold_adapter(network: nn.Module) -> nn.Module:
    """Add the adapter's products to the base's weights, so that a forward skips PEFT's extra products.

    The function stays the same up to rounding. Do not fold 16-bit weights: an update that is small beside its weight
    would be rounded away, whereas an adapter beside the base keeps it. A network whose weights cannot take the products
    is returned as it is: one partitioned by ZeRO-3, since no rank holds a whole weight, and those of `_can_fold`.
    """
    if not isinstance(network, PeftModel) or _is_partitioned(network) or not _can_fold(network):
        return network
    return network.merge_and_unload()


@torch.inference_mode()
def check_folded(teacher: TeacherNetwork, prompts: Sequence[EncodedPrompt], adapter: Path) -> None:
    """Raise ModelError if the teacher gives other logits once its adapter is folded. It stays folded."""
    expected_PA = teacher(prompts)
    with refusing(f"{adapter}: PEFT cannot add the adapter to its base"):
        teacher.network = fold_adapter(teacher.network)
    if not are_close(teacher(prompts), expected_PA, teacher):
        raise ModelError(
            f"{adapter}: gives other logits once PEFT has added it to its base, as an export in float32 does; choose "
            "another kind of adapter"
        )


def _can_fold(network: PeftModel) -> bool:
    """Whether the base has a place for all that the adapter adds, which nothing but the adapted layer reads."""
    # Tied embeddings are one tensor under two names: an adapter of the output embedding would change the input, too.
    # PEFT also repeats whole layers without copying them (layer_replication).
    num_names = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    for layer in network.modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        base = layer.get_base_layer()
        if any(num_names[id(parameter)] > 1 for parameter in base.parameters()):
            return False
        # A bias of the adapter (lora_bias) needs one of the layer.
        if any(getattr(layer, "lora_bias", {}).values()) and getattr(base, "bias", None) is None:
            return False
    return True


def _is_partitioned(network: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in network.parameters())


def _dummy_prompt() -> EncodedPrompt:
    """The shortest prompt that all families take: a seq2seq reads its answer at position 1 of the decoder."""
    return EncodedPrompt(tokens=np.zeros(2, dtype=np.int32), answer=1)


class Intent(IntEnum):
    """What a rank is about to do. All ranks follow the largest intent among them."""

    LEAVE = 0
    WAIT = 1
    FORWARD = 2
    STOP = 3
    FAIL = 4


class Lockstep:
    """Keeps the forwards of all ranks in step. It is the wait policy (`wait`, `finish`) of such an export's workers.

    Before each forward the ranks agree on what comes next. A rank with nothing to score joins in with a dummy prompt
    until no rank has anything left.
    """

    def __init__(
        self, engine: nn.Module, teacher: TeacherNetwork, runtime: Runtime, stop: StopSignal
    ) -> None:
        self.may_complete = runtime.is_main
        self._engine, self._device, self._stop = engine, teacher.device, stop
        self._is_over = False
        self._dummy = [_dummy_prompt()]

    def forward(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
        """`TeacherNetwork.answers_and_rest`. Collective: every rank runs one forward.

        Raises Stopped on every rank once any rank was asked to stop, TrainingError if another rank failed.
        """
        self._agree(Intent.FORWARD)
        return self._forward(prompts)

    def wait(self, seconds: float) -> None:
        """Join in one forward of the other ranks, or sleep if none of them has work. Collective."""
        if self._agree(Intent.WAIT) == Intent.FORWARD:
            self._forward(self._dummy)
        else:
            time.sleep(seconds)

    def finish(self) -> None:
        """Join in until no rank has anything left. Collective."""
        while (intent := self._agree(Intent.LEAVE)) != Intent.LEAVE:
            if intent == Intent.FORWARD:
                self._forward(self._dummy)
        self._is_over = True

    @contextmanager
    def together(self) -> Iterator[None]:
        """An exception inside the block ends the other ranks too, at their next forward. Collective."""
        try:
            yield
        except BaseException as error:
            # Once the ranks have agreed on an end, no other one waits at an exchange.
            if not self._is_over:
                with suppress(RuntimeError):  # the others may be gone already
                    self._exchange(Intent.STOP if isinstance(error, Stopped) else Intent.FAIL)
            raise

    @torch.inference_mode()
    def _forward(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
        return self._engine(prompts)

    def _agree(self, intent: Intent) -> Intent:
        # The largest intent counts, so a stop or a failure of one rank reaches all of them at the same forward.
        agreed = self._exchange(Intent.STOP if self._stop.requested else intent)
        self._is_over = agreed in (Intent.STOP, Intent.FAIL)
        if agreed == Intent.STOP:
            raise Stopped("export stopped between two forwards; run the same command again to resume")
        if agreed == Intent.FAIL:
            raise TrainingError("another rank failed: see its message; run the same command again to resume")
        return agreed

    def _exchange(self, intent: Intent) -> Intent:
        value = torch.tensor([int(intent)], device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return Intent(int(value.item()))


class _AnswersAndRest(nn.Module):
    """`TeacherNetwork.answers_and_rest` as a forward, because DeepSpeed only hooks the forward of the top module."""

    def __init__(self, teacher: TeacherNetwork) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
        """`TeacherNetwork.answers_and_rest`."""
        return self.teacher.answers_and_rest(prompts)


def load_partitioned(
    directory: Path,
    *,
    runtime: Runtime,
    stop: StopSignal,
    dtype: str,
    micro_batch_tokens: int,
    base: str | None = None,
    persistence_threshold: int | None = None,
) -> tuple[TeacherScorer, Lockstep]:
    """`TeacherScorer.load` with parameters partitioned over all ranks; no rank ever holds all of them. Collective.

    Parameters of up to `persistence_threshold` values stay whole on each rank (None: DeepSpeed's default).
    """
    # Here, not at the top: a whole teacher is scored without DeepSpeed.
    import_deepspeed()
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    from kdecs.teacher.engine import join_deepspeed

    zero: dict[str, Any] = {"stage": 3}
    if persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = persistence_threshold
    settings = {
        # DeepSpeed insists on a batch size, though nothing is trained here.
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 1_000_000,
    }
    join_deepspeed(runtime)
    # Transformers loads partitioned while an HfDeepSpeedConfig is alive, and holds only a weak reference to it.
    partitioned = HfDeepSpeedConfig(settings)
    try:
        scorer = TeacherScorer.load(
            directory, runtime=runtime, dtype=dtype, micro_batch_tokens=micro_batch_tokens, base=base
        )
    finally:
        del partitioned
    with refusing(f"{directory}: cannot be partitioned over the ranks, set engine=replica"):
        engine, *_ = deepspeed.initialize(model=_AnswersAndRest(scorer.network), config=settings)
    engine.eval()
    lockstep = Lockstep(engine, scorer.network, runtime, stop)
    return replace(scorer, forward=lockstep.forward), lockstep
