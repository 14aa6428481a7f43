"""Teachers of 1B and 7B parameters on one GPU, random weights in bfloat16: trees against pairs, MFU, memory.

Training is LoRA with AdamW over global batches of 64 pairs; scoring gives the answer words' logits and the mass of
the rest. Both go over the same pairs twice: by trees, and pair by pair, that is prompts in padded batches of like
length under the same token budget (the stronger loop; prompts one at a time are timed too, over a few of them). The
losses and logits of both are compared in the same run. MFU counts the operations that the trees' tokens need (no
recomputation) over the GPU's peak. At the end the teacher's own engine (ZeRO-2, one rank) trains over the same trees:
its peak of memory must be within 10% of what `kdecs plan` counts, else the run fails.

    python benchmarks/gpu_teacher.py                # needs CUDA; one line says so where there is none
    python benchmarks/gpu_teacher.py --shapes 1b
    python benchmarks/gpu_teacher.py --smoke        # the same code over a tiny network on any device, nothing written
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _gpu_peak import STAGE, check_peak, measured_peak, planned_peak
from _teacher_parts import SHAPES, corpus_tokenizer
from record import Rates, alternate, corpus_split, device_name, write_record
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.reading import read_corpus
from kdecs.teacher.config import LoraConfig
from kdecs.teacher.data import MicroBatch, fixed_batches, make_units, max_pairs_per_tree
from kdecs.teacher.families import CausalFamily, EncodedPrompt
from kdecs.teacher.metering import network_flops
from kdecs.teacher.network import TeacherNetwork, add_lora, connective_loss, trainable_parameters
from kdecs.teacher.plan.hardware import gpu_of_device
from kdecs.teacher.tree.attention import use_tree_attention
from kdecs.teacher.tree.prefix_tree import pack

GPU_SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "smoke": SHAPES["tiny"],
}
TOKENS = {"1b": 16384, "7b": 8192, "smoke": 512}
STEP_PAIRS = 64
ONE_BY_ONE_PAIRS = 32
TOLERANCE = 5e-2


@dataclass(frozen=True)
class Bench:
    """A network on its device, the pairs, and a token budget."""

    shape: str
    device: torch.device
    family: CausalFamily
    network: nn.Module
    pairs: list[Pair]
    prompts: list[EncodedPrompt]
    corpus: str

    def teacher(self, *, use_tree: bool) -> TeacherNetwork:
        """The network asked by trees or by padded prompts."""
        return TeacherNetwork(self.family, self.network, use_tree=use_tree, device=self.device)

    def batches(self, *, use_tree: bool, max_pairs: int) -> list[MicroBatch]:
        """Forwards of one pass under the token budget, trees of at most so many pairs."""
        units = make_units(
            self.family,
            self.pairs,
            self.prompts,
            use_tree=use_tree,
            max_tokens=TOKENS[self.shape],
            max_pairs=max_pairs,
        )
        return fixed_batches(units, micro_batch_tokens=TOKENS[self.shape], padded=not use_tree)

    def of(self, batch: MicroBatch) -> tuple[list[EncodedPrompt], Tensor]:
        """Prompts and gold of a micro-batch."""
        is_cause_P = torch.tensor([self.pairs[n].is_cause for n in batch.pairs], device=self.device)
        return [self.prompts[n] for n in batch.pairs], is_cause_P


def build(shape: str, device: torch.device, num_dialogues: int) -> Bench:
    """A network with random weights made on the device, LoRA on it, and prompts in tokens of the corpus's own BPE."""
    path, corpus = corpus_split("valid")
    with tempfile.TemporaryDirectory() as directory:
        corpus_tokenizer(path).save_pretrained(directory)
        family = CausalFamily(directory, max_prompt_tokens=2048, emotions_shown="coarse")
    torch.manual_seed(0)
    config = LlamaConfig(**GPU_SHAPES[shape])
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    base.config.use_cache = False
    use_tree_attention(base)
    if shape == "7b":  # activations of 8,192 tokens in 32 layers are more than one GPU holds
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    network = add_lora(base, LoraConfig(), family.lora_task).to(torch.bfloat16)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    dialogues = [pairs for d in read_corpus(path).dialogues if (pairs := pairs_of(d, "fold1"))]
    chosen = np.random.default_rng(0).permutation(len(dialogues))[:num_dialogues]
    pairs = [pair for n in sorted(chosen) for pair in dialogues[n]]
    return Bench(shape, device, family, network, pairs, [family.encode(p) for p in pairs], corpus)


def train(bench: Bench, batches: Sequence[MicroBatch], *, use_tree: bool) -> float:
    """One pass of LoRA training at learning rate 0 (every pass has the same losses); the mean loss."""
    teacher = bench.teacher(use_tree=use_tree).train()
    optimizer = torch.optim.AdamW(trainable_parameters(teacher), lr=0.0)
    total = torch.zeros((), device=bench.device)
    held = 0
    for number, batch in enumerate(batches):
        prompts, is_cause_P = bench.of(batch)
        loss = connective_loss(teacher(prompts), is_cause_P)
        (loss / STEP_PAIRS).backward()
        total += loss.detach()
        held += len(batch.pairs)
        if held >= STEP_PAIRS or number == len(batches) - 1:
            optimizer.step()
            optimizer.zero_grad()
            held = 0
    return float(total) / sum(len(batch.pairs) for batch in batches)


@torch.inference_mode()
def score(bench: Bench, batches: Sequence[MicroBatch], *, use_tree: bool) -> np.ndarray:
    """Answer-word logits of all pairs of the batches, by pair index."""
    teacher = bench.teacher(use_tree=use_tree).eval()
    found = np.zeros((len(bench.pairs), len(bench.family.answer_ids)), dtype=np.float32)
    for batch in batches:
        answers_PA, _ = teacher.answers_and_rest(bench.of(batch)[0])
        found[list(batch.pairs)] = answers_PA.cpu().numpy()
    return found


def timed(bench: Bench, job: Callable[[], Any], amount: int) -> Callable[[], float]:
    """A side of `alternate`: the device is waited for."""

    def run() -> float:
        job()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        return float(amount)

    return run


def rate_of_singles(bench: Bench, job: Callable[[list[MicroBatch]], Any]) -> float:
    """Pairs a second, prompts one at a time."""
    few = [MicroBatch((n,)) for n in range(min(ONE_BY_ONE_PAIRS, len(bench.pairs)))]
    started = time.perf_counter()
    timed(bench, lambda: job(few), len(few))()
    return len(few) / (time.perf_counter() - started)


def mfu(bench: Bench, batches: Sequence[MicroBatch], rate: float, *, is_training: bool) -> float | None:
    """Operations that the trees need a second, over the GPU's peak; None where that is unknown."""
    if bench.device.type != "cuda":
        return None
    gpu = gpu_of_device(device_name(), torch.cuda.get_device_properties(bench.device).total_memory / 2**30)
    if gpu is None:
        return None
    trees = [pack([bench.prompts[n].tokens for n in batch.pairs]) for batch in batches]
    flops = network_flops(bench.network, checkpointing=False).of(
        tokens=sum(tree.num_tokens for tree in trees),
        attended_pairs=sum(int((tree.positions_N + 1).sum()) for tree in trees),
        answers=len(bench.pairs),
    )
    needed = flops.total if is_training else flops.forward
    return needed / len(bench.pairs) * rate / (gpu.peak_tflops * 1e12)


def report(
    bench: Bench, kind: str, rates: Rates, details: dict[str, Any], *, is_smoke: bool
) -> dict[str, Any]:
    """Write one record, or print it in a smoke run."""
    record = {
        "unit": "pairs/s",
        "ours": float(np.median(rates.ours)),
        "baseline": float(np.median(rates.baseline)),
        "ratio": rates.ratio,
        "baseline_name": "padded batches of like length, same token budget",
        "corpus": bench.corpus,
        "dtype": "bfloat16",
        "details": details | {"ratios": rates.ratios, "micro_batch_tokens": TOKENS[bench.shape]},
    }
    name = f"gpu_teacher_{kind}_{bench.shape}"
    if is_smoke:
        print(name, record)
        return record
    return write_record(name, **record)


def run(shape: str, device: torch.device, *, num_dialogues: int, rounds: int) -> dict[str, Any]:
    """Measure training and scoring of one shape. Exits where trees and pairs do not agree."""
    bench = build(shape, device, num_dialogues)
    amount = len(bench.pairs)
    trees = bench.batches(use_tree=True, max_pairs=max_pairs_per_tree(STEP_PAIRS))
    whole = bench.batches(use_tree=True, max_pairs=amount)
    padded = bench.batches(use_tree=False, max_pairs=1)
    # Also the warm-up: kernels are compiled here.
    our_loss, their_loss = train(bench, trees, use_tree=True), train(bench, padded, use_tree=False)
    logits, expected = score(bench, whole, use_tree=True), score(bench, padded, use_tree=False)
    difference = float(np.abs(logits - expected).max() / max(1.0, np.abs(expected).max()))
    if difference > TOLERANCE or abs(our_loss - their_loss) > TOLERANCE * their_loss:
        raise SystemExit(
            f"{shape}: trees and pairs differ: loss {our_loss}, {their_loss}; logits {difference}"
        )
    training = alternate(
        timed(bench, lambda: train(bench, trees, use_tree=True), amount),
        timed(bench, lambda: train(bench, padded, use_tree=False), amount),
        rounds=rounds,
    )
    scoring = alternate(
        timed(bench, lambda: score(bench, whole, use_tree=True), amount),
        timed(bench, lambda: score(bench, padded, use_tree=False), amount),
        rounds=rounds,
    )
    shared = {"pairs": amount, "dialogues": num_dialogues, "relative_difference_of_logits": difference}
    is_smoke = shape == "smoke"
    singles = rate_of_singles(bench, lambda few: train(bench, few, use_tree=False))
    trained = report(
        bench,
        "training",
        training,
        shared
        | {
            "mean_loss": {"trees": our_loss, "pairs": their_loss},
            "one_by_one_pairs_per_second": singles,
            "mfu": mfu(bench, trees, float(np.median(training.ours)), is_training=True),
        },
        is_smoke=is_smoke,
    )
    singles = rate_of_singles(bench, lambda few: score(bench, few, use_tree=False))
    scored = report(
        bench,
        "scoring",
        scoring,
        shared
        | {
            "one_by_one_pairs_per_second": singles,
            "mfu": mfu(bench, whole, float(np.median(scoring.ours)), is_training=False),
        },
        is_smoke=is_smoke,
    )
    return {"training": trained, "scoring": scored, "memory": memory(bench, trees, is_smoke=is_smoke)}


def memory(bench: Bench, trees: Sequence[MicroBatch], *, is_smoke: bool) -> dict[str, Any]:
    """The plan's peak against the engine's. Exits where they differ, once the record is written."""
    step = [bench.of(batch) for batch in sorted(trees, key=lambda batch: -len(batch.pairs))[:4]]
    teacher = bench.teacher(use_tree=True)
    planned = planned_peak(teacher, step, checkpointing=bench.shape == "7b")
    measured, loss = measured_peak(teacher, step)
    record = {
        "unit": "bytes",
        "ours": planned.total,
        "baseline": float(measured),
        "baseline_name": f"peak of DeepSpeed's engine, ZeRO-{STAGE}, one rank",
        "corpus": bench.corpus,
        "dtype": "bfloat16",
        "details": {"mean_loss": loss, "parts": vars(planned), "micro_batch_tokens": TOKENS[bench.shape]},
    }
    if not is_smoke:
        write_record(f"gpu_teacher_memory_{bench.shape}", **record)
    if measured:
        check_peak(bench.shape, planned, measured)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=["1b", "7b"], default=["1b", "7b"])
    parser.add_argument("--dialogues", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny network on any device, nothing written")
    arguments = parser.parse_args()
    if arguments.smoke:
        run("smoke", torch.device("cuda" if device_name() else "cpu"), num_dialogues=2, rounds=1)
        return
    if not device_name():
        print("gpu_teacher: no CUDA device, skipped")
        return
    for shape in arguments.shapes:
        run(shape, torch.device("cuda"), num_dialogues=arguments.dialogues, rounds=arguments.rounds)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
