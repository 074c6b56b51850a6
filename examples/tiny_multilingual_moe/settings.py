"""Every setting that was tried, by name; EXPERIMENTS.md has what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from corpus import Mixture

GRADED = {
    "en": 24000, "es": 1600, "de": 1600, "fr": 1200, "ru": 800, "zh": 800, "tr": 500,
    "ja": 400, "sw": 300, "hi": 200, "th": 150, "bn": 100,
}  # fmt: skip


FEWER = {
    "en": 40000, "es": 1000, "de": 1000, "fr": 700, "ru": 500, "zh": 400, "tr": 300,
    "ja": 200, "sw": 150, "hi": 100, "th": 60, "bn": 30,
}  # fmt: skip


FEW = {
    "en": 40000, "es": 300, "de": 300, "fr": 200, "ru": 120, "zh": 80, "tr": 60,
    "ja": 40, "sw": 30, "hi": 20, "th": 12, "bn": 8,
}  # fmt: skip
FEWEST = {
    "en": 40000, "es": 60, "de": 60, "fr": 40, "ru": 25, "zh": 20, "tr": 15,
    "ja": 10, "sw": 8, "hi": 6, "th": 4, "bn": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A model and how it is trained."""

    mixture: Mixture
    steps: int
    model: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 2048
    row_length: int = 160
    rows_per_step: int = 32
    learning_rate: float = 3e-3


MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 24,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def _with_lookups(task: dict[str, int]) -> Setting:
    mixture = Mixture(
        task, general=2000, general_english=4000, translations=1200, sums=6000, lookups=1500
    )
    return Setting(mixture, 4500, MODEL, rows_per_step=16, learning_rate=2e-3)


SETTINGS = {
    "graded": Setting(Mixture(GRADED, general=4000, general_english=4000), 2600, MODEL),
    "translations": Setting(
        Mixture(GRADED, general=3000, general_english=4000, translations=1500), 2600, MODEL
    ),
    "chat": Setting(
        Mixture(FEWER, general=2500, general_english=4000, translations=1200, sums=6000),
        6200,
        MODEL,
        rows_per_step=16,
        learning_rate=2e-3,
    ),
    "lookups": _with_lookups(FEW),
    "lookups-fewest": _with_lookups(FEWEST),
    "miniature": Setting(
        Mixture({"en": 300, "es": 30}, general=60, languages=["en", "es"]),
        160,
        MODEL | {"num_hidden_layers": 4, "hidden_size": 64, "num_experts": 8},
        vocab_size=512,
        rows_per_step=8,
    ),
}
