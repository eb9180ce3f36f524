"""Fine-tune a language model with any method: the paper's Tables 1, 2 and Figs. 1, 8, for someone with a GPU.

    pip install datasets
    python examples/language.py configs/paper/glue-deberta.yaml task=cola method=spectral-additive
    python examples/language.py configs/paper/gsm8k-mistral.yaml method=spectral-additive rank=8

Settings are read strictly: a misspelt key is an error that names the nearest. The result is one JSON file beside the
adapter. ``model`` may be any folder or hub id of transformers, ``data`` any dataset of the hub, or a folder with
``train.jsonl`` and ``test.jsonl``.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from pydantic import Field
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from spectral_diffusion import SpectralConfig
from spectral_diffusion.config.settings import Settings, build, parse_overrides, read_yaml
from spectral_diffusion.core.errors import UserError
from spectral_diffusion.methods import get_method

# GLUE: the sentences of a task, and what is reported of it.
GLUE = {
    "cola": (("sentence",), "matthews_correlation"), "sst2": (("sentence",), "accuracy"),
    "mrpc": (("sentence1", "sentence2"), "accuracy"), "stsb": (("sentence1", "sentence2"), "pearson"),
    "qnli": (("question", "sentence"), "accuracy"), "rte": (("sentence1", "sentence2"), "accuracy"),
    "qqp": (("question1", "question2"), "accuracy"), "mnli": (("premise", "hypothesis"), "accuracy"),
}  # fmt: skip


class LanguageConfig(Settings):
    """One fine-tuning of a language model."""

    model: str
    kind: Literal["classify", "generate"]
    data: str  # a dataset of the hub, or a folder with train.jsonl and test.jsonl
    task: str = ""  # of GLUE, or the dataset's configuration
    prompt: str = "{question}\n"  # of a generation task, over its fields
    answer: str = "{answer}"
    method: str = "spectral-additive"
    rank: int = Field(8, ge=1)
    slot: str = ""  # default: the top columns
    target_modules: list[str] = Field(["q_proj", "v_proj"], min_length=1)
    learning_rate: float = Field(1e-4, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    length: int = Field(256, ge=8)
    warmup: float = Field(0.06, ge=0, le=1)
    limit: int | None = Field(None, ge=1)  # examples of each split, to try it
    seed: int = 0
    dtype: str = "float32"
    output: Path = Path("language")


def load_data(config: LanguageConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the training and the test split."""
    folder = Path(config.data)
    if folder.is_dir():
        found = {}
        for split in ("train", "test"):
            lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
            found[split] = [json.loads(line) for line in lines if line.strip()]
    else:
        from datasets import load_dataset

        found = load_dataset(config.data, config.task or None)
    held_out = next(found[name] for name in ("validation", "validation_matched", "test") if name in found)
    train, test = list(found["train"]), list(held_out)
    return train[: config.limit], test[: config.limit]


class Allocate(TrainerCallback):
    """Lets AdaLoRA take singular values away after every step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(state.global_step)


def peft_config(config: LanguageConfig, steps: int) -> PeftConfig:
    """The method as PEFT takes it, for so many steps; ours find their columns themselves."""
    method = get_method(config.method)
    task = "SEQ_CLS" if config.kind == "classify" else "CAUSAL_LM"
    if method.name in {"lora", "dora"}:
        return LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=config.target_modules, task_type=task,
                          use_dora=method.name == "dora")  # fmt: skip
    if method.peft:
        from peft import AdaLoraConfig

        options = method.peft.options(config.rank, steps)
        return AdaLoraConfig(target_modules=config.target_modules, task_type=task, **options)
    return SpectralConfig(
        r=config.rank,
        method=method.name,
        slot=config.slot or None,
        target_modules=config.target_modules,
        task_type=task,
    )


def run(config: LanguageConfig) -> dict[str, Any]:
    """Fine-tune, save the adapter and ``result.json``; returns the figures."""
    torch.manual_seed(config.seed)
    train, test = load_data(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    metric = None
    if config.kind == "classify":
        fields, metric = GLUE.get(config.task, (("sentence",), "accuracy"))
        regression = config.task == "stsb"
        labels = 1 if regression else len({row["label"] for row in train})
        model = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=labels)

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            found = tokenizer(*(row[name] for name in fields), truncation=True, max_length=config.length)
            return {**found, "labels": float(row["label"]) if regression else row["label"]}

        collate: Any = DataCollatorWithPadding(tokenizer)
    else:
        dtype = getattr(torch, config.dtype)
        model = AutoModelForCausalLM.from_pretrained(config.model, torch_dtype=dtype)

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            asked = tokenizer(config.prompt.format(**row)).input_ids
            answer = tokenizer(config.answer.format(**row), add_special_tokens=False).input_ids
            told = [*answer, tokenizer.eos_token_id]
            ids = (asked + told)[: config.length]
            return {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": ([-100] * len(asked) + told)[: len(ids)],
            }

        collate = DataCollatorForSeq2Seq(tokenizer)
    encoded = [[encode(row) for row in part] for part in (train, test)]
    batch = config.batch_size * config.gradient_accumulation_steps
    steps = math.ceil(len(encoded[0]) / batch) * math.ceil(config.epochs)
    tuned = get_peft_model(model, peft_config(config, steps))
    trainer = Trainer(
        tuned,
        TrainingArguments(
            output_dir=str(config.output / "state"), learning_rate=config.learning_rate, num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size, per_device_eval_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps, warmup_steps=config.warmup,
            seed=config.seed, report_to=[], save_strategy="no", logging_steps=10, bf16=config.dtype == "bfloat16",
        ),
        callbacks=[Allocate()], train_dataset=encoded[0], eval_dataset=encoded[1], data_collator=collate,
        compute_metrics=(lambda found: score(found, metric)) if metric else None,
    )  # fmt: skip
    trainer.train()
    figures = {
        "trained": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "test": trainer.evaluate(),
        "curve": [one for one in trainer.state.log_history if "loss" in one],
        "config": config.model_dump(mode="json"),
    }
    tuned.save_pretrained(config.output / "adapter")
    (config.output / "result.json").write_text(json.dumps(figures, indent=1))
    return figures


def score(found: Any, metric: str) -> dict[str, float]:
    """GLUE's metric of a task."""
    import numpy as np

    predictions, labels = found
    if metric == "pearson":
        return {metric: float(np.corrcoef(predictions[:, 0], labels)[0, 1])}
    chosen = predictions.argmax(-1)
    if metric == "matthews_correlation":  # of two classes it is Pearson's; 0 where one class is all there is
        both = len(set(chosen.tolist())) > 1 and len(set(labels.tolist())) > 1
        return {metric: float(np.corrcoef(chosen, labels)[0, 1]) if both else 0.0}
    return {metric: float((chosen == labels).mean())}


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    try:
        config = build(LanguageConfig, read_yaml(Path(sys.argv[1])), parse_overrides(sys.argv[2:]), file=sys.argv[1])
    except UserError as error:
        raise SystemExit(f"Error: {error}") from error
    figures = run(config)
    print(json.dumps({"trained": figures["trained"], "test": figures["test"]}))


if __name__ == "__main__":
    main()
