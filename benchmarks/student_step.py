"""Training a student: pairs a second against transformers' Trainer, and TextBrewer's loop, on the same prompts.

Both sides train an encoder of one shape on the same pairs in batches of 16, float32: AdamW, clipping, linear schedule.
The pairs are those of some batches of an epoch, chosen so that a pair costs what it costs in the epoch. The Trainer
trains `*ForMaskedLM` on the words at the two masks, as its users do: the pairs in random order, padded to a batch's
longest prompt, the head over the whole vocabulary. TextBrewer distils into the same network from logits that cost
nothing. Ours is a step as `launch/train_student.py` takes it, span heads included. Checked in the same run: our loss of
a batch is that of the whole model's logits in a loop over pairs, to 1e-5. Prompts have up to 512 tokens. Few steps
flatter the Trainer, whose batches then meet few long prompts: of the padding that it has over all of these dialogues,
2.2 tokens for one of ours, 3 steps show 1.5, 8 show 2.0, 12 show 2.2.

Against a Trainer, blocks of 16 MiB and more go back to the system when they are freed, on both sides: glibc would keep
those below 32 MiB, in fragments, and at RoBERTa-base's shape the Trainer outgrows 24 GiB. Of two steps of ours neither
does, so that glibc is left as users have it.

`--against pair` sets our step over trees (`model.layout: tree`) against our step over pairs, and `--layout tree` sets
it against the Trainer: each side takes batches of about 16 pairs that are like those of an epoch of its layout. The
two layouts take turns at each step.
`--branch short` gives the trees short branches (`model.branch`).

With one thread (OMP_NUM_THREADS=1) a record counts processor seconds, which other programs do not change.

`--against eager` sets our step with a compiled encoder (`compile: true`) against our step without; compiling comes
before, and its seconds stand in the record.

    python benchmarks/student_step.py                    # both shapes
    python benchmarks/student_step.py --shape minilm --against eager
    python benchmarks/student_step.py --shape minilm --against pair --tokens 128
"""

import argparse
import ctypes
import gc
import importlib.util
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _student_parts import SHAPES, Shape, make_base, some_dialogues
from record import alternate, alternate_steps, corpus_split, write_rates
from torch.nn import functional
from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments

from kdecs.config import config_hash, parse_config
from kdecs.process import StopSignal
from kdecs.runtime import Runtime
from kdecs.student.config import StudentConfig
from kdecs.student.losses import step_loss
from kdecs.student.training import StudentTask, prepare
from kdecs.training.loop import EpochLoop

BATCH_PAIRS = 16
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
NAMES = {"minilm": "student_step_vs_hf_trainer", "base": "student_step_vs_hf_trainer_base"}
TARGETS = {"minilm": 3.5, "base": 2.5}
TREE_TARGETS = {128: 2.0, 512: 2.5}


@dataclass(frozen=True)
class Job:
    """The same work for both sides: a base, batches of rows of a corpus cache, our training over them."""

    base: Path
    batches: list[list[np.ndarray]]
    """Of each step the rows, in groups that stay together."""
    task: StudentTask
    loop: EpochLoop

    @property
    def rows(self) -> np.ndarray:
        """The rows of all batches."""
        return np.concatenate([rows for batch in self.batches for rows in batch])

    @property
    def num_targets(self) -> int:
        """The targets that the pairs of all batches belong to, in the layout tree."""
        return len(np.unique(self.task.data.train.trunk_row[self.rows]))

    @property
    def num_tokens(self) -> int:
        """The tokens of all batches, padding included."""
        ones = np.ones(len(self.rows), dtype=np.float32)
        sizes = [np.concatenate(batch) for batch in self.batches]
        return sum(self.task.data.batch(rows, ones[: len(rows)])[0].token_ids_RT.numel() for rows in sizes)


def make_job(
    directory: Path,
    shape: Shape,
    num_steps: int,
    max_tokens: int,
    *,
    is_compiled: bool = False,
    layout: str = "pair",
    branch: str = "paper",
) -> tuple[Job, str]:
    """A trainer over the corpus, and `num_steps` of its first epoch's batches."""
    directory.mkdir(exist_ok=True)
    train, corpus = corpus_split("train")
    train = some_dialogues(train, directory, 60)
    valid = some_dialogues(corpus_split("valid")[0], directory, 3)
    base = make_base(directory / "base", shape, train)
    values = {
        "output": str(directory / "student"),
        "cache": str(directory / "cache"),
        "corpus": {"train": str(train), "valid": str(valid)},
        "model": {"base": str(base), "span_head": "pointer", "max_prompt_tokens": max_tokens}
        | {"layout": layout, "branch": branch},
        "distillation": {"mode": "joint"},
        "batches": {"global_batch_pairs": BATCH_PAIRS},
        "optimization": {"learning_rate": 1e-4, "weight_decay": 0.01, "epochs": 1},
        "compile": is_compiled,
    }
    config = parse_config(StudentConfig, values, source="benchmark")
    config.output.mkdir()
    runtime = Runtime(0, 0, 1, torch.device("cpu"))
    task, loop = prepare(config, config_hash(config), runtime, StopSignal())
    batches = loop.settings.epoch_batches(0)
    if layout == "pair":
        batches = [batch for batch in batches if len(batch[0]) == BATCH_PAIRS]
    chosen = representative(task, batches, num_steps)
    return Job(base, [batches[place] for place in chosen], task, loop), corpus


def representative(task: StudentTask, batches: list[list[np.ndarray]], num_steps: int) -> list[int]:
    """Of 300 seeded draws of an epoch's batches the one most like the epoch in what a pair costs.

    A few batches drawn blindly may share twice as much as the epoch does (a target has from 1 to 30 pairs), or hold
    prompts of half the length.
    """
    cache = task.data.train

    def sizes(batch: list[np.ndarray]) -> tuple[int, ...]:
        """Pairs, and what their cost depends on: tokens, and how long their sequences are."""
        rows = np.concatenate(batch)
        branches = cache.num_tokens[rows]
        if cache.layout == "pair":
            tokens = int(branches.max()) * len(rows)
            return len(rows), tokens, tokens * int(branches.max())
        trunks = sum(int(cache.num_trunk_tokens[group[0]]) for group in batch)
        in_prompts = int((branches + cache.num_trunk_tokens[rows]).sum())
        return len(rows), len(batch), int(branches.sum()) + trunks, in_prompts

    sizes_BS = np.array([sizes(batch) for batch in batches], dtype=float)

    def costs_of_a_pair(sizes_BS: np.ndarray) -> np.ndarray:
        pairs, *others = sizes_BS.sum(0)
        return np.log(np.array(others) / pairs)

    generator = np.random.default_rng(0)
    draws = [generator.permutation(len(batches))[:num_steps] for _ in range(300)]
    wanted = costs_of_a_pair(sizes_BS)
    return min(draws, key=lambda draw: np.abs(costs_of_a_pair(sizes_BS[draw]) - wanted).sum()).tolist()


def our_steps(job: Job) -> Iterator[float]:
    """Train on the batches as an epoch draws them; yields the pairs of each step."""
    job.task.model.train()
    for batch in job.batches:
        job.loop.step(batch)
        yield float(sum(map(len, batch)))


def our_side(job: Job) -> Callable[[], float]:
    """All of these steps at once."""
    return lambda: sum(our_steps(job))


class MaskedWords(torch.utils.data.Dataset):
    """The same prompts as a Trainer takes them: token ids, and the answer words' ids at the two masks."""

    def __init__(self, job: Job) -> None:
        cache, model = job.task.data.train, job.task.model
        self.items = []
        for row in job.rows:
            ids = cache.list_at("token_ids", int(row)).astype(np.int64)
            labels = np.full(len(ids), -100)
            labels[cache.column("emotion_mask")[row]] = model.emotion_ids[int(cache.column("emotion")[row])]
            connective = 0 if cache.column("is_cause")[row] else 4
            labels[cache.column("connective_mask")[row]] = model.connective_ids[connective]
            self.items.append({"input_ids": ids, "labels": labels})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.items[index]


def collate(items: list[dict[str, np.ndarray]], pad_id: int) -> dict[str, torch.Tensor]:
    """Padded to the longest of the batch, as DataCollatorForTokenClassification does."""
    width = max(len(item["input_ids"]) for item in items)
    ids, labels = np.full((len(items), width), pad_id), np.full((len(items), width), -100)
    for row, item in enumerate(items):
        ids[row, : len(item["input_ids"])] = item["input_ids"]
        labels[row, : len(item["labels"])] = item["labels"]
    lengths = np.array([len(item["input_ids"]) for item in items])
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    return {
        name: torch.from_numpy(v)
        for name, v in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))
    }


def hugging_face_side(job: Job, directory: Path, at_once: int) -> Callable[[], float]:
    """transformers.Trainer over the same pairs, one epoch in random order, `at_once` in a forward."""
    model = AutoModelForMaskedLM.from_pretrained(job.base)
    pad_id = AutoTokenizer.from_pretrained(job.base).pad_token_id
    data = MaskedWords(job)
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=BATCH_PAIRS // at_once,
        num_train_epochs=1,
        learning_rate=1e-4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )

    def train() -> float:
        gc.collect()  # an earlier Trainer with its optimizer
        Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=lambda i: collate(i, pad_id)
        ).train()
        return float(len(data))

    return train


def textbrewer_side(job: Job, directory: Path) -> Callable[[], float]:
    """TextBrewer's GeneralDistiller: the same prompts, the teacher's logits looked up, not computed."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    model = AutoModelForMaskedLM.from_pretrained(job.base)
    pad_id = AutoTokenizer.from_pretrained(job.base).pad_token_id
    connectives = job.task.model.connective_ids
    data = MaskedWords(job)

    class Lookup(torch.nn.Module):
        """A teacher whose logits cost nothing."""

        def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.zeros(len(input_ids), len(connectives))

    def answers(batch: dict[str, torch.Tensor], outputs: Any) -> dict[str, Any]:
        if isinstance(outputs, torch.Tensor):
            return {"logits": outputs}
        place = (batch["labels"] != -100).float().cumsum(1).eq(2).float().argmax(1)
        logits = outputs.logits[torch.arange(len(place)), place][:, connectives]
        return {"logits": logits, "losses": [outputs.loss]}

    loader = torch.utils.data.DataLoader(
        data, BATCH_PAIRS, shuffle=True, collate_fn=lambda items: collate(items, pad_id)
    )

    def train() -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        settings = DistillationConfig(temperature=2, hard_label_weight=0.6, kd_loss_weight=0.4)
        distiller = GeneralDistiller(
            TrainingConfig(device="cpu", output_dir=str(directory / "textbrewer"), ckpt_frequency=0),
            settings,
            Lookup(),
            model,
            answers,
            answers,
        )
        with distiller:
            distiller.train(optimizer, loader, num_epochs=1, max_grad_norm=1.0, callback=None)
        return float(len(data))

    return train


@torch.no_grad()
def largest_difference(job: Job) -> float:
    """Our loss of a batch against the whole model's logits and a loop over pairs, without dropout."""
    task = job.task
    model = task.model.eval()
    rows = job.rows[:BATCH_PAIRS]
    batch, targets = task.data.batch(rows, np.ones(len(rows), dtype=np.float32))
    ours, _ = step_loss(model(batch), targets, task.config.distillation, count=len(rows), world_size=1)
    cache, losses = task.data.train, []
    for row in rows:
        ids = torch.from_numpy(cache.list_at("token_ids", int(row)).astype(np.int64))[None]
        output = model.language_model(input_ids=ids, output_hidden_states=True)
        logits, hidden = output.logits[0], output.hidden_states[-1][0]

        def at(name: str, row: int = row) -> int:
            return int(cache.column(name)[row])

        emotion = logits[at("emotion_mask"), model.emotion_ids].log_softmax(0)[at("emotion")]
        words = logits[at("connective_mask"), model.connective_ids].softmax(0)
        cause = words[:4].sum() if at("is_cause") else words[4:].sum()
        loss = -0.6 * emotion - cause.log()
        first = at("candidate_first")
        tokens = hidden[first : first + int(cache.num_candidate_tokens[row])]
        head = model.span_head
        for mask, gold, query, none in (
            ("start_mask", "span_start", head.start, head.no_start),
            ("end_mask", "span_end", head.end, head.no_end),
        ):
            state = hidden[at(mask)]
            places = torch.cat((none(state), tokens @ query(state) / hidden.size(-1) ** 0.5))
            if at(gold) >= 0:
                loss = loss + 0.6 * functional.cross_entropy(places, torch.tensor(at(gold)))
        losses.append(loss)
    model.train()
    return abs(float(ours - torch.stack(losses).mean()))


def measure_compiled(shape_name: str, num_steps: int, rounds: int, max_tokens: int) -> None:
    """Our step with a compiled encoder against our step without."""
    shape = SHAPES[shape_name]
    with tempfile.TemporaryDirectory() as scratch:
        eager, corpus = make_job(Path(scratch, "eager"), shape, num_steps, max_tokens)
        compiled, _ = make_job(Path(scratch, "compiled"), shape, num_steps, max_tokens, is_compiled=True)
        began = time.perf_counter()
        our_side(compiled)()
        first = time.perf_counter() - began
        rates = alternate(our_side(compiled), our_side(eager), rounds=rounds)
        again = len(compiled.rows) / float(np.median(rates.ours))
        write_rates(
            f"student_step_compiled_{shape_name}",
            rates,
            baseline_name=f"the same step, not compiled, {shape.description}",
            corpus=corpus,
            details={
                "seconds_to_compile": first - again,
                "pairs": len(eager.rows),
                "batch": BATCH_PAIRS,
                "max_prompt_tokens": max_tokens,
            },
        )


def measure_trees(
    shape_name: str,
    num_steps: int,
    rounds: int,
    against: str,
    max_tokens: int,
    at_once: int,
    branch: str,
) -> None:
    """Our step over trees against our step over pairs, or against the Trainer, both with the paper's prompts."""
    shape = SHAPES[shape_name]
    with tempfile.TemporaryDirectory() as scratch:
        tree, corpus = make_job(
            Path(scratch, "tree"), shape, num_steps, max_tokens, layout="tree", branch=branch
        )
        pair, _ = make_job(Path(scratch, "pair"), shape, num_steps, max_tokens)
        named = {branch: "paper", shape_name: "minilm", str(max_tokens): "512"}
        suffix = "".join(f"_{part}" for part, usual in named.items() if part != usual)
        if against == "pair":
            name, baseline_name = "student_step_tree_vs_pair", "our step over pairs"
            target = TREE_TARGETS.get(max_tokens)
            rates = alternate_steps(lambda: our_steps(tree), lambda: our_steps(pair), rounds=rounds)
        else:
            name, baseline_name, target = "student_step_tree_vs_hf_trainer", "transformers.Trainer", 10.0
            rates = alternate(our_side(tree), hugging_face_side(pair, Path(scratch), at_once), rounds=rounds)
        write_rates(
            name + suffix,
            rates,
            baseline_name=f"{baseline_name}, {shape.description}",
            corpus=corpus,
            target=target,
            details={
                "pairs": len(tree.rows),
                "baseline_pairs": len(pair.rows),
                "targets": tree.num_targets,
                "steps": num_steps,
                "tokens_a_pair": tree.num_tokens / len(tree.rows),
                "baseline_tokens_a_pair": pair.num_tokens / len(pair.rows),
                "max_prompt_tokens": max_tokens,
            },
        )


def measure(
    shape_name: str,
    num_steps: int,
    rounds: int,
    against: str,
    max_tokens: int,
    at_once: int,
    layout: str,
    branch: str,
) -> None:
    """One shape against the Trainer, TextBrewer (MiniLM's shape, where it is installed), or both."""
    if against == "pair" or layout == "tree":
        measure_trees(shape_name, num_steps, rounds, against, max_tokens, at_once, branch)
        return
    if against == "eager":
        measure_compiled(shape_name, num_steps, rounds, max_tokens)
        return
    shape = SHAPES[shape_name]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        job, corpus = make_job(directory, shape, num_steps, max_tokens)
        difference = largest_difference(job)
        if difference > 1e-5:
            raise SystemExit(f"{shape_name}: the losses differ by {difference}, expected at most 1e-5")
        ours = our_side(job)
        sides = {}
        if against != "textbrewer":
            trainer = hugging_face_side(job, directory, at_once)
            sides[NAMES[shape_name]] = ("transformers.Trainer", trainer)
        if against != "trainer" and shape_name == "minilm" and importlib.util.find_spec("textbrewer"):
            sides["student_step_vs_textbrewer"] = (
                "TextBrewer's GeneralDistiller",
                textbrewer_side(job, directory),
            )
        for name, (baseline_name, baseline) in sides.items():
            rates = alternate(ours, baseline, rounds=rounds)
            write_rates(
                name,
                rates,
                baseline_name=f"{baseline_name}, {shape.description}",
                corpus=corpus,
                target=TARGETS[shape_name] if "hf_trainer" in name else None,
                details={
                    "pairs": len(job.rows),
                    "batch": BATCH_PAIRS,
                    "trainer_pairs_at_once": at_once,
                    "max_prompt_tokens": max_tokens,
                    "mean_tokens": float(job.task.data.train.num_tokens[job.rows].mean()),
                    "largest_loss_difference": difference,
                },
            )


def return_large_blocks() -> None:
    """Have glibc give blocks of 16 MiB and more back to the system; another C library is left as it is."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 16 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument(
        "--against", choices=("trainer", "textbrewer", "both", "eager", "pair"), default="both"
    )
    parser.add_argument("--layout", choices=("pair", "tree"), default="pair")
    parser.add_argument("--branch", choices=("paper", "short"), default="paper", help="of trees")
    parser.add_argument("--steps", type=int, help="steps a side and round (default 12, base 8)")
    parser.add_argument("--tokens", type=int, default=512, help="longest prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--at-once",
        type=int,
        choices=(1, 2, 4, 8, BATCH_PAIRS),
        default=BATCH_PAIRS,
        help="pairs that the Trainer takes at once: fewer where memory is small",
    )
    arguments = parser.parse_args()
    if arguments.against != "pair":
        return_large_blocks()
    for name, steps in (("minilm", 12), ("base", 8)):
        if arguments.shape in (name, "all"):
            measure(
                name,
                arguments.steps or steps,
                arguments.rounds,
                arguments.against,
                arguments.tokens,
                arguments.at_once,
                arguments.layout,
                arguments.branch,
            )


if __name__ == "__main__":
    main()
