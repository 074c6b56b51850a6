"""Train the embedded model: data, tokenizer, checkpoint and log from nothing.

    python examples/tiny_multilingual_moe/train.py FOLDER --setting graded --seed 0

Run it again after an interruption and it goes on from the last saved step. It runs on a GPU where
there is one. ``FOLDER/base`` is an ordinary transformers checkpoint (bfloat16 safetensors),
``FOLDER/training_log.json`` the loss by step.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from corpus import Mixture, documents
from packing import PackedRows
from settings import SETTINGS, Setting
from tokenizer import build_tokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint


def corpus_tokenizer(setting: Setting) -> PreTrainedTokenizerFast:
    """The tokenizer of a setting: trained on as many rows of each language."""
    languages = setting.mixture.languages
    rows = dict.fromkeys(languages, 600)
    texts = documents(Mixture(rows, general=1200, languages=languages), seed=10_000)
    return build_tokenizer(texts, setting.vocab_size)


def new_model(setting: Setting, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """The setting's model with random weights."""
    config = Qwen3MoeConfig(
        vocab_size=setting.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **setting.model,
    )
    return Qwen3MoeForCausalLM(config)


def arguments(setting: Setting, folder: Path, seed: int) -> TrainingArguments:
    """What transformers' Trainer needs."""
    return TrainingArguments(
        output_dir=str(folder / "state"),
        max_steps=setting.steps,
        per_device_train_batch_size=setting.rows_per_step,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=max(5, setting.steps // 40),
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=max(1, setting.steps // 100),
        save_steps=max(10, setting.steps // 20),
        save_total_limit=1,
        seed=seed,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )


def train(folder: Path, setting: Setting, seed: int = 0) -> list[dict]:
    """Train and write ``FOLDER/base`` and the log; returns the log."""
    tokenizer = corpus_tokenizer(setting)
    rows = PackedRows(documents(setting.mixture, seed), tokenizer, setting.row_length)
    print(f"{len(rows)} rows, {rows.tokens} tokens in one epoch")
    torch.manual_seed(seed)
    last = _last(folder)
    # Trainer reads a checkpoint with load_state_dict, which misses experts: they are saved one by
    # one and held together in memory. from_pretrained converts them.
    model = Qwen3MoeForCausalLM.from_pretrained(last) if last else new_model(setting, tokenizer)
    model.config.output_router_logits = True  # adds the balancing loss
    trainer = Trainer(model, arguments(setting, folder, seed), train_dataset=rows)
    trainer.train(resume_from_checkpoint=last)
    model.config.output_router_logits, model.config.use_cache = False, True  # Trainer turned it off
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows_seen = setting.steps * setting.rows_per_step
    sizes = {
        "parameters": model.num_parameters(),
        "tokens": round(rows.tokens / len(rows) * rows_seen),
    }
    return _write_log(folder, setting, seed, sizes, trainer.state.log_history)


def _last(folder: Path) -> str | None:
    state = folder / "state"
    return get_last_checkpoint(str(state)) if state.is_dir() else None


def _write_log(
    folder: Path, setting: Setting, seed: int, sizes: dict[str, int], history: list[dict]
) -> list[dict]:
    log = {"seed": seed, "setting": asdict(setting), **sizes, "history": history}
    (folder / "training_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--setting", choices=SETTINGS, default="graded")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.folder, SETTINGS[args.setting], args.seed)


if __name__ == "__main__":
    main()
