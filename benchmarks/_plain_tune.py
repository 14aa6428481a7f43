"""The baseline of `sweep_trials_per_hour`: a plain Ray Tune script around Hugging Face's Trainer.

It trains the same pairs for the same epochs with the same losses: prompts are tokenised in each trial, batches are
random and padded, the masked language model's whole head runs at every position. Run as a script with a student's
config, the number of trials and how many run at a time; prints one JSON line.
"""

import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from kdecs.config import load_config
from kdecs.student.config import StudentConfig


def examples_of(config: StudentConfig, tokenizer: Any, split: str) -> list[dict[str, int | list[int]]]:
    """Every pair's prompt and targets as plain lists."""
    from kdecs.corpus.answer_words import CONNECTIVES
    from kdecs.corpus.encoding import PairEncoder
    from kdecs.corpus.pairs import pairs_of
    from kdecs.corpus.splits import read_split, training_split

    is_train = split == "train"
    dialogues = (
        training_split(config.corpus)
        if is_train
        else read_split(config.corpus, config.corpus.valid).dialogues
    )
    pairs = [pair for dialogue in dialogues for pair in pairs_of(dialogue, "fold1+neutral")]
    words = {word: tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in CONNECTIVES}
    found = []
    encoder = PairEncoder(tokenizer, config.model.max_prompt_tokens)
    for pair, encoded in zip(pairs, encoder.encode(pairs), strict=True):
        found.append(
            {
                "input_ids": list(encoded.token_ids),
                "emotion_mask": encoded.emotion_mask,
                "connective_mask": encoded.connective_mask,
                "start_mask": encoded.start_mask,
                "end_mask": encoded.end_mask,
                "emotion": tokenizer.encode(f" {pair.emotion}", add_special_tokens=False)[0],
                "connective": words["because" if pair.is_cause else "other"],
                "span_start": max(0, encoded.span_start),
                "span_end": max(0, encoded.span_end),
            }
        )
    return found


def train_one(values: dict[str, Any]) -> None:
    """One trial: load, tokenise, train, evaluate every epoch, save."""
    import torch
    from ray import tune
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForMaskedLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

    torch.set_num_threads(1)
    config = load_config(StudentConfig, Path(values["config"]))
    set_seed(values["seed"])
    tokenizer = AutoTokenizer.from_pretrained(config.model.base)
    model = AutoModelForMaskedLM.from_pretrained(config.model.base)
    model.span_head = torch.nn.Linear(model.config.hidden_size, 2 * config.model.max_prompt_tokens)
    train, valid = (examples_of(config, tokenizer, split) for split in ("train", "valid"))

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        padded = tokenizer.pad({"input_ids": [item["input_ids"] for item in batch]}, return_tensors="pt")
        rest = {key: torch.tensor([item[key] for item in batch]) for key in batch[0] if key != "input_ids"}
        return {**padded, **rest}

    class SpanTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            output = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                output_hidden_states=True,
            )
            row = torch.arange(len(inputs["input_ids"]))
            emotion = cross_entropy(output.logits[row, inputs["emotion_mask"]], inputs["emotion"])
            cause = cross_entropy(output.logits[row, inputs["connective_mask"]], inputs["connective"])
            hidden = output.hidden_states[-1]
            edges = [
                cross_entropy(
                    model.span_head(hidden[row, inputs[f"{edge}_mask"]]).chunk(2, -1)[n],
                    inputs[f"span_{edge}"],
                )
                for n, edge in enumerate(("start", "end"))
            ]
            loss = config.distillation.alpha * (emotion + edges[0] + edges[1]) + cause
            return (loss, {"loss": loss}) if return_outputs else loss

    output = str(config.output.parent / f"trial{values['seed']}")
    trainer = SpanTrainer(
        model,
        TrainingArguments(
            output_dir=output,
            num_train_epochs=config.optimization.epochs,
            per_device_train_batch_size=config.batches.global_batch_pairs,
            per_device_eval_batch_size=64,
            learning_rate=config.optimization.learning_rate,
            weight_decay=config.optimization.weight_decay,
            warmup_steps=config.optimization.warmup_share,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            logging_strategy="epoch",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            prediction_loss_only=True,
            use_cpu=True,
            seed=values["seed"],
        ),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=valid,
    )
    trainer.train()
    trainer.save_model(output)
    tune.report({"loss": trainer.state.log_history[-1].get("train_loss", 0.0), "pairs": len(train)})


def main() -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    # Otherwise Ray would write a token into the home directory, readable by all users, and use it from then on.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray
    from ray import tune

    path, number, at_a_time = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    ray.init(address="local", num_cpus=at_a_time, include_dashboard=False, log_to_driver=False)
    results = tune.Tuner(
        tune.with_resources(train_one, {"cpu": 1}),
        param_space={"config": path, "seed": tune.grid_search(list(range(number)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_a_time, reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(Path(path).parent / "ray"), verbose=0),
    ).fit()
    assert not results.errors, results.errors[0]
    print(json.dumps({"pairs": results[0].metrics["pairs"], "losses": [r.metrics["loss"] for r in results]}))


if __name__ == "__main__":
    main()
