"""What cards cite: the papers, and what each method does with which of their equations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from steered_moe.steering import RouterSteering


class Paper(NamedTuple):
    """A paper on arXiv."""

    title: str
    authors: str
    year: int


class Method(NamedTuple):
    """What a method does, for people.

    Args:
        does: Continues "This steering ...".
        source: arXiv number, or "" of a method of this library's own.
        where: Equation or section.
    """

    does: str
    source: str = ""
    where: str = ""


ROUTING, UNDERSTANDING, STEERMOE = "2510.04694", "2601.14050", "2509.09660"

PAPERS: Mapping[str, Paper] = {
    ROUTING: Paper(
        "Multilingual Routing in Mixture-of-Experts",
        "Lucas Bandarkar and Chenyuan Yang and Mohsen Fayyaz and Junlin Hu and Nanyun Peng",
        2025,
    ),
    UNDERSTANDING: Paper(
        "Understanding Multilingualism in Mixture-of-Experts LLMs: Routing Mechanism, Expert "
        "Specialization, and Layerwise Steering",
        "Yuxin Chen and Zhengzhou Cai and Xiangtian Ji and Weixiang Zhao and An Zhang and "
        "Xiang Wang and Tat-Seng Chua",
        2026,
    ),
    STEERMOE: Paper(
        "Steering MoE LLMs via Expert (De)Activation",
        "Mohsen Fayyaz and Ali Modarressi and Hanieh Deilamsalehy and Franck Dernoncourt and "
        "Ryan Rossi and Trung Bui and Hinrich Schütze and Nanyun Peng",
        2025,
    ),
}
"""By arXiv number."""

METHOD_FACTS: Mapping[str, Method] = {
    "task_experts": Method(
        "promotes the experts that texts of a task select more often than general texts do",
        ROUTING,
        "Eq. 3, applied as Eq. 4 (soft) or Eq. 5 (hard)",
    ),
    "multilingual_experts": Method(
        "promotes the experts that other languages select more often than the pivot language",
        ROUTING,
        "Sec. 5.2",
    ),
    "shared_experts": Method(
        "promotes the experts that all of its languages use", UNDERSTANDING, "released code"
    ),
    "exclusive_experts": Method(
        "switches off the experts that one language uses and others do not",
        UNDERSTANDING,
        "released code",
    ),
    "risk_difference": Method(
        "forces the experts that tokens of one corpus select most above the other, and bans those "
        "they select most below it",
        STEERMOE,
        "Sec. 3.1",
    ),
    "preferred": Method(
        "promotes the experts that the pivot language selects more often than the target language"
    ),
    "random_experts": Method(
        "is a control: as many experts per layer as another steering, drawn at random"
    ),
    "sum": Method("is the sum of several steerings"),
}
"""By the name that a steering's provenance records."""

EDITS: Mapping[str, Method] = {
    "std": Method("z_e + strength * weight_e * std(z)", ROUTING, "Eq. 4"),
    "abs": Method("z_e + strength * weight_e * |z_e|", UNDERSTANDING, "released code"),
    "none": Method("z_e + strength * weight_e"),
}
"""Formula of each scale; z are the token's router logits."""

FORCED = Method("z_e = max(z): selected for every token", ROUTING, "Eq. 5")
BANNED = Method("z_e < min(z): never selected", STEERMOE, "Eq. 8")


def edits(steering: RouterSteering) -> list[Method]:
    """What a steering does to logits: the formula of its scale, force, bans, as far as it has
    them."""
    force = steering.force
    found = [EDITS[steering.scale]] if steering.weights.any() or force is None else []
    found += [FORCED] if force is not None and (force > 0).any() else []
    return found + ([BANNED] if force is not None and (force < 0).any() else [])


def cited(fact: Method) -> str:
    """``arXiv 2510.04694 Eq. 4``; empty for a method of no paper."""
    return f"arXiv {fact.source} {fact.where}" if fact.source else ""


def bibtex(source: str) -> str:
    """The BibTeX entry of a paper."""
    paper = PAPERS[source]
    return "\n".join(
        [
            f"@article{{arxiv{source.replace('.', '_')},",
            f"  title = {{{paper.title}}},",
            f"  author = {{{paper.authors}}},",
            f"  journal = {{arXiv preprint arXiv:{source}}},",
            f"  year = {{{paper.year}}},",
            "}",
        ]
    )
