"""LoRA training of a causal teacher: pairs a second against transformers' Trainer with PEFT, batches of 16.

Both sides train one and the same network (weights, adapters, dtype) on the same pairs of some whole dialogues, with
AdamW and clipping, on the loss over the answer words. The Trainer takes prompts in random order, or grouped by
length, pads each batch to its longest prompt and runs the head at every position, as its users do. Ours is a step as
`launch/train_teacher.py` takes it: global batches, trees, micro-batches by tokens. The learning rate is 0, so that
every round has the same losses: their means are compared in each.

    python benchmarks/teacher_training.py                       # both records
    python benchmarks/teacher_training.py --sampling random --dialogues 4 --rounds 3
    python benchmarks/teacher_training.py --shape tiny --dry    # a smoke run, nothing written
"""

import argparse
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _teacher_parts import (
    BATCH_PAIRS,
    Job,
    as_baseline,
    measure,
    parser_of,
    prepare,
    report,
)
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from kdecs.teacher.data import Unit, global_batches, make_units, max_pairs_per_tree, share_among_ranks
from kdecs.teacher.network import DTYPES, TeacherNetwork, add_lora, connective_loss, trainable_parameters
from kdecs.teacher.tree.attention import use_tree_attention

RECORDS = {
    "random": ("teacher_training_vs_hf_trainer", 8.0, "transformers.Trainer + PEFT, random batches of 16"),
    "group_by_length": (
        "teacher_training_vs_group_by_length",
        3.5,
        "transformers.Trainer + PEFT, group_by_length",
    ),
}
DIALOGUES = {"random": 3, "group_by_length": 5}
"""Grouping needs more of them: few pairs sorted by length still pad, which a whole split's do not."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


class PromptDataset(torch.utils.data.Dataset):
    """Token ids, and the gold answer as the label of the last token."""

    def __init__(self, job: Job) -> None:
        self.items = [
            {"input_ids": prompt.tokens.astype(np.int64), "is_cause": pair.is_cause}
            for pair, prompt in zip(job.pairs, job.prompts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right to the longest of the batch; labels hold the gold at each prompt's last token."""
    width = max(len(item["input_ids"]) for item in items)
    ids, mask = (np.zeros((len(items), width), dtype=np.int64) for _ in range(2))
    labels = np.full((len(items), width), -100)
    for row, item in enumerate(items):
        size = len(item["input_ids"])
        ids[row, :size], mask[row, :size] = item["input_ids"], 1
        labels[row, size - 1] = item["is_cause"]
    parts = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(values) for name, values in parts.items()}


def our_side(job: Job, network: nn.Module, losses: list[float]) -> Callable[[], float]:
    """One epoch as the teacher's training takes it, with torch's AdamW."""
    batches = job.config.batches
    units = our_units(job)
    teacher = TeacherNetwork(job.family, network, use_tree=True, device=torch.device("cpu"))

    def train() -> float:
        use_tree_attention(network.get_base_model())
        teacher.train()
        parameters = trainable_parameters(teacher)
        optimizer = torch.optim.AdamW(parameters, lr=0.0)
        total = 0.0
        steps = global_batches(
            units, batch_pairs=batches.global_batch_pairs, bucket_batches=1, seed=0, epoch=0
        )
        for step in steps:
            count = sum(len(unit.pairs) for unit in step)
            (micro_batches,) = share_among_ranks(
                step, world_size=1, micro_batch_tokens=batches.micro_batch_tokens, padded=False
            )
            for micro in micro_batches:
                is_cause_P = torch.tensor([job.pairs[n].is_cause for n in micro.pairs])
                loss = connective_loss(teacher([job.prompts[n] for n in micro.pairs]), is_cause_P)
                (loss / count).backward()
                total += float(loss.detach())
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total / len(job.pairs))
        return float(len(job.pairs))

    return train


def our_units(job: Job) -> list[Unit]:
    """The trees of the job's pairs."""
    batches = job.config.batches
    return make_units(
        job.family,
        job.pairs,
        job.prompts,
        use_tree=True,
        max_tokens=batches.micro_batch_tokens,
        max_pairs=max_pairs_per_tree(batches.global_batch_pairs),
    )


def trainer_side(
    job: Job, network: nn.Module, sampling: str, directory: Path, losses: list[float]
) -> Callable[[], float]:
    """transformers.Trainer over the same pairs, one epoch."""
    data = PromptDataset(job)
    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=BATCH_PAIRS,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy=sampling,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=0,
    )
    summed: list[float] = []

    def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        row, last = torch.nonzero(labels != -100, as_tuple=True)
        loss = connective_loss(outputs.logits[row, last][:, job.family.answer_ids], labels[row, last].bool())
        summed.append(float(loss.detach()))
        return loss / len(row)

    def train() -> float:
        as_baseline(network)
        summed.clear()
        Trainer(
            model=network,
            args=arguments,
            train_dataset=data,
            data_collator=collate,
            compute_loss_func=answer_loss,
        ).train()
        losses.append(sum(summed) / len(data))
        return float(len(data))

    return train


def compare(sampling: str, arguments: argparse.Namespace, directory: Path) -> None:
    """Measure one way of sampling and write its record."""
    job = prepare(
        directory,
        shape=arguments.shape,
        num_dialogues=arguments.dialogues or DIALOGUES[sampling],
        dtype=arguments.dtype,
    )
    base = job.family.load_network(job.config.model.base, dtype=DTYPES[arguments.dtype])
    base.config.use_cache = False
    torch.manual_seed(0)
    network = add_lora(base, job.config.lora, job.family.lora_task).to(DTYPES[arguments.dtype])
    for name, parameter in network.named_parameters():
        if (
            "lora_B" in name
        ):  # zero at the start: adapters that do something make the comparison one of all parts
            nn.init.normal_(parameter, std=0.02)
    ours: list[float] = []
    theirs: list[float] = []
    rates = measure(
        our_side(job, network, ours),
        trainer_side(job, network, sampling, directory, theirs),
        rounds=arguments.rounds,
    )
    for our_loss, their_loss in itertools.product(ours, theirs):
        if not math.isclose(our_loss, their_loss, rel_tol=TOLERANCE[arguments.dtype]):
            raise SystemExit(f"losses differ: {our_loss} by trees, {their_loss} by the Trainer")
    report(
        RECORDS[sampling],
        job,
        rates,
        arguments,
        tokens_in_forwards=sum(unit.tokens for unit in our_units(job)),
        details={"mean_loss": {"ours": ours[0], "baseline": theirs[0]}},
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sampling", choices=[*RECORDS, "both"], default="both")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    arguments = parser.parse_args()
    for sampling in RECORDS if arguments.sampling == "both" else [arguments.sampling]:
        with tempfile.TemporaryDirectory() as directory:
            compare(sampling, arguments, Path(directory))


if __name__ == "__main__":
    main()
