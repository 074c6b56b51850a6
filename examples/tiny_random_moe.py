"""Write a tiny Qwen3-MoE checkpoint with random weights, and a steering repo beside it.

    python examples/tiny_random_moe.py FOLDER

The checkpoint is an ordinary transformers folder (config, safetensors, tokenizer). Random weights
know no language: the texts it generates are noise, and only show that steering changes them.
"""

from __future__ import annotations

import string
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from steered_moe import RouterSteering, SteeredMoEForCausalLM

TEXT = """A router sends each token of a text to a few of its many experts.
Un routeur envoie chaque mot du texte à quelques-uns de ses nombreux experts.
Ein Router schickt jedes Wort des Textes zu wenigen seiner vielen Experten.
Kipanga njia hutuma kila neno la maandishi kwa wataalamu wachache kati ya wengi."""
LAYERS, EXPERTS, TOP_K = 6, 16, 4


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of the words and characters of `TEXT`; anything else becomes ``<unk>``."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>", "<unk>"],
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def build_model(seed: int = 0) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE of 6 layers and 16 experts; weights are random, routing is spread out."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen3MoeForCausalLM(config).eval()


def build_steering() -> RouterSteering:
    """Promote experts 0 to 3 of the middle layers by half a standard deviation each."""
    weights = torch.zeros(2, EXPERTS)
    weights[:, :4] = 0.5
    return RouterSteering("middle", [2, 3], weights, provenance={"method": "example"})


def write(folder: Path) -> Path:
    """Write ``base`` and ``steered`` below ``folder``; returns the latter."""
    build_model().save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    model = SteeredMoEForCausalLM.from_base(folder / "base", build_steering(), strength=2.0)
    model.save_pretrained(folder / "steered", tokenizer=build_tokenizer())
    return folder / "steered"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write(Path(sys.argv[1])))
