"""Routing of every family, stated once more in float64, to hold the steered models against.

The rules below say what a model card says: how logits become scores, which experts win, and which
weights they get. Every setting comes from the model's configuration, every bias from its tensors,
so nothing of transformers' own routing code runs here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

Routing = tuple[Tensor, Tensor]


def reference_routing(
    model: PreTrainedModel, layer: int, logits: Tensor, forced: Tensor, banned: Tensor
) -> Routing:
    """Route the tokens of one decoder layer by edited logits, as the experts should see it.

    logits: [tokens, columns], after the edit and before any soft-cap. For inkling_text the logits
        of its shared experts follow in further columns: they are never edited or selected, but
        share in the normalisation of the weights.
    forced, banned: bool [columns]; forced experts take their places first, banned ones are behind
        all others, also behind the experts of groups that lost. The remaining places go by the
        family's own order. Equal scores (as those of several experts in groups that lost) are
        taken by index, where transformers promises no order.

    Returns selected, bool [tokens, columns], and weights, float64 [tokens, columns]: those that
    arrive at the experts' input, so without factors that a model applies to the experts' output.
    """
    place = Place(model, layer, forced, banned)
    return RULES[model.config.model_type](place, logits.double())


@dataclass(frozen=True)
class Place:
    """Where tokens are routed: a layer of a model, and the experts that are forced or banned."""

    model: PreTrainedModel
    layer: int
    forced: Tensor
    banned: Tensor

    def setting(self, name: str) -> Any:
        """Return a value of the configuration, None if there is none; the name may be dotted."""
        try:
            return attrgetter(name)(self.model.config)
        except AttributeError:
            return None

    def tensor(self, name: str) -> Tensor:
        """Return the layer's only parameter or buffer with this last name, float64 and flat."""
        pattern = re.compile(rf"\.{self.layer}\.(?:\w+\.)*{name}$")
        tensors: dict[str, Tensor] = dict(self.model.named_parameters())
        tensors.update(self.model.named_buffers())
        (found,) = (tensor for key, tensor in tensors.items() if pattern.search(key))
        return found.detach().double().flatten()

    def select(self, order: Tensor, top_k: int, taken: Tensor | None = None) -> Tensor:
        """Pick the top k of each row of `order` [tokens, columns]; `taken` were picked before."""
        forced = self.forced if taken is None else self.forced & ~taken
        rank = 1 + forced.int() - self.banned.int()
        by_order = order.argsort(dim=-1, descending=True, stable=True)
        by_rank = rank.expand(order.shape).gather(-1, by_order)
        by_rank = by_order.gather(-1, by_rank.argsort(dim=-1, descending=True, stable=True))
        return torch.zeros_like(order, dtype=torch.bool).scatter(-1, by_rank[:, :top_k], True)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _root_of_softplus(logits: Tensor) -> Tensor:
    return functional.softplus(logits).sqrt()


@dataclass(frozen=True)
class Groups:
    """Group-limited choice: only experts of the `topk_group` best of `n_group` groups compete.

    best: how many experts of a group make its score
    outside: what the scores of the other groups' experts become
    """

    best: int
    outside: float

    def lost(self, place: Place, order: Tensor) -> Tensor:
        """Mark the experts [tokens, columns] of groups that do not compete."""
        count, kept = place.setting("n_group"), place.setting("topk_group")
        if count is None:
            return torch.zeros_like(order, dtype=torch.bool)
        groups = order.view(len(order), count, -1)
        winners = groups.topk(self.best, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
        lost = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, winners, False)
        return lost.unsqueeze(-1).expand_as(groups).flatten(-2)


@dataclass(frozen=True)
class ByScores:
    """Score all experts, select by score, and weigh by the scores of those selected.

    score: from logits to scores, [tokens, columns] both
    bias: name of the tensor that is added to the scores for the selection only
    biased: whether there is such a tensor, as the name of a setting
    groups: how groups of experts limit the selection
    normalised: whether the weights of a token are made to sum to one, or the name of a setting
    epsilon: what is added to that sum
    scale: name of the setting that multiplies the weights
    expert_scale: name of the tensor that multiplies the weights of each expert
    top_k: name of the setting for the number of selected experts
    """

    score: Callable[[Tensor], Tensor] = _softmax
    bias: str | None = None
    biased: bool | str = True
    groups: Groups | None = None
    normalised: bool | str = False
    epsilon: float = 0.0
    scale: str | None = None
    expert_scale: str | None = None
    top_k: str = "num_experts_per_tok"

    def __call__(self, place: Place, logits: Tensor) -> Routing:
        """Return selected and weights [tokens, columns]."""
        scores = self.score(logits)
        selected = place.select(self.order(place, scores), place.setting(self.top_k))
        weights = scores.where(selected, 0.0)
        if _holds(place, self.normalised):
            weights = weights / (weights.sum(-1, keepdim=True) + self.epsilon)
        return selected, weights * self.factor(place)

    def order(self, place: Place, scores: Tensor) -> Tensor:
        """Return the values [tokens, columns] by which experts are selected."""
        if self.bias is not None and _holds(place, self.biased):
            scores = scores + place.tensor(self.bias)
        if self.groups is not None:
            scores = scores.masked_fill(self.groups.lost(place, scores), self.groups.outside)
        return scores

    def factor(self, place: Place) -> float | Tensor:
        """Return what multiplies the weights, a number or one value per column."""
        factor = 1.0 if self.scale is None else place.setting(self.scale)
        return factor if self.expert_scale is None else factor * place.tensor(self.expert_scale)


def _holds(place: Place, condition: bool | str) -> bool:
    """Return a condition, looked up in the configuration where it is the name of a setting."""
    return bool(place.setting(condition)) if isinstance(condition, str) else condition


def by_logits(place: Place, logits: Tensor, top_k: str = "num_experts_per_tok") -> Routing:
    """Select by the logits, then share the weight among the selected by softmax."""
    selected = place.select(logits, place.setting(top_k))
    return selected, logits.masked_fill(~selected, -torch.inf).softmax(-1)


def cohere2(place: Place, logits: Tensor) -> Routing:
    """Select by the logits; the weights are a softmax or a sigmoid of the selected ones."""
    if place.setting("expert_selection_fn") == "softmax":
        return by_logits(place, logits)
    return ByScores(score=torch.sigmoid, normalised="norm_topk_prob")(place, logits)


def dbrx(place: Place, logits: Tensor) -> Routing:
    """Select by softmax and divide the weights by their p-norm."""
    selected, weights = ByScores(top_k="ffn_config.moe_top_k")(place, logits)
    power = place.setting("ffn_config.moe_normalize_expert_weights")
    return selected, weights if power is None else weights / weights.norm(power, -1, keepdim=True)


def deepseek_v2(place: Place, logits: Tensor) -> Routing:
    """Select by softmax among the best groups; an expert of another group has no weight.

    A forced expert keeps its weight: its group must not take from it what the force gave.
    """
    scores = logits.softmax(-1)
    if place.setting("topk_method") == "group_limited_greedy":
        lost = Groups(best=1, outside=0.0).lost(place, scores)
        scores = scores.masked_fill(lost & ~place.forced, 0.0)
    selected = place.select(scores, place.setting("num_experts_per_tok"))
    return selected, scores.where(selected, 0.0) * place.setting("routed_scaling_factor")


def deepseek_v4(place: Place, logits: Tensor) -> Routing:
    """Select by biased scores, except in layers that look up the experts of each token."""
    if place.setting("mlp_layer_types")[place.layer] == "hash_moe":
        raise ValueError(f"layer {place.layer} selects by token, not by logits")
    score = {"sqrtsoftplus": _root_of_softplus, "sigmoid": torch.sigmoid}
    rule = partial(_BIASED, score=score[place.setting("scoring_func")], epsilon=1e-20)
    return rule(scale="routed_scaling_factor")(place, logits)


def ernie(place: Place, logits: Tensor) -> Routing:
    """Select by biased softmax; weights are normalised by a sum that is not let below a minimum."""
    selected, weights = ByScores(bias=_CORRECTION)(place, logits)
    return selected, weights / weights.sum(-1, keepdim=True).clamp(place.setting("moe_norm_min"))


def inkling(place: Place, logits: Tensor) -> Routing:
    """Select by biased sigmoid; the selected and the shared experts share the weight together."""
    routed = logits[:, : len(place.forced)]
    order = routed.sigmoid() + place.tensor(_CORRECTION)
    selected = place.select(order, place.setting("num_experts_per_tok"))
    shared = logits[:, len(place.forced) :].sigmoid().sum(-1, keepdim=True)
    chosen = routed.sigmoid().where(selected, 0.0)
    factor = place.setting("route_scale") * place.tensor("global_scale")
    return selected, chosen / (chosen.sum(-1, keepdim=True) + shared) * factor


def kolibri1(place: Place, logits: Tensor) -> Routing:
    """Select by biased logits, weigh by sigmoid."""
    order = logits + place.tensor(_CORRECTION)
    selected = place.select(order, place.setting("num_experts_per_tok"))
    weights = logits.sigmoid().where(selected, 0.0)
    if place.setting("norm_topk_prob"):
        weights = weights / weights.sum(-1, keepdim=True)
    return selected, weights


def laguna(place: Place, logits: Tensor) -> Routing:
    """Press the logits below a cap, then select by biased sigmoid."""
    cap = place.setting("moe_router_logit_softcapping")
    capped = cap * torch.tanh(logits / cap) if cap > 0 else logits
    return _BIASED()(place, capped)


def llama4(place: Place, logits: Tensor) -> Routing:
    """Select by the logits and weigh by sigmoid; weights of one token need not sum to one."""
    return ByScores(score=torch.sigmoid)(place, logits)


def sparsemixer(place: Place, logits: Tensor) -> Routing:
    """Pick an expert twice, each time weighed by a softmax over the logits close to the largest.

    A forced expert is picked before any other; of two forced ones that with the larger logit, and
    of two with equal logits that with the lower index.
    """
    first = place.select(logits, 1)
    rest = logits.masked_fill(first, -torch.inf)
    second = place.select(rest, 1, taken=first)
    weights = _near_softmax(place, logits, logits).where(first, 0.0)
    return first | second, weights + _near_softmax(place, logits, rest).where(second, 0.0)


def _near_softmax(place: Place, logits: Tensor, left: Tensor) -> Tensor:
    """Take the softmax of the logits that are left and within a tolerance of their largest."""
    largest = left.amax(-1, keepdim=True)
    distance = (largest - logits) / torch.maximum(logits.abs(), largest)
    far = distance > 2 * place.setting("router_jitter_noise")
    return left.masked_fill(far, -torch.inf).softmax(-1)


def zaya(place: Place, logits: Tensor) -> Routing:
    """Select by biased softmax; the last column skips the experts and so has no weight."""
    selected, weights = ByScores(bias="balancing_biases")(place, logits)
    return selected, functional.pad(weights[:, :-1], (0, 1))


_CORRECTION = "e_score_correction_bias"
_FLAG = "norm_topk_prob"
_SCALE = "routed_scaling_factor"
_BIASED = partial(ByScores, score=torch.sigmoid, bias=_CORRECTION, normalised=True)

_SOFTMAX_BY_FLAG = ByScores(normalised=_FLAG)
_SOFTMAX_NORMALISED = ByScores(normalised=True)
_GROUPED = partial(_BIASED, normalised=_FLAG, epsilon=1e-20)
_SIGMOID_GROUPED = _GROUPED(groups=Groups(best=2, outside=-torch.inf), scale=_SCALE)

RULES: dict[str, Callable[[Place, Tensor], Routing]] = {
    "afmoe": _BIASED(bias="expert_bias", epsilon=1e-20, scale="route_scale"),
    "aria_text": partial(by_logits, top_k="moe_topk"),
    "axk1": _SIGMOID_GROUPED,
    "axk2": _GROUPED(groups=Groups(best=2, outside=0.0), scale=_SCALE),
    "bailing_hybrid": _SIGMOID_GROUPED,
    "beam": _GROUPED(groups=Groups(best=2, outside=-torch.inf)),
    "cohere2_moe": cohere2,
    "dbrx": dbrx,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": _SIGMOID_GROUPED,
    "deepseek_v32": _SIGMOID_GROUPED,
    "deepseek_v4": deepseek_v4,
    "dots1": _SIGMOID_GROUPED,
    "dots3_note_text": _SIGMOID_GROUPED,
    "ernie4_5_moe": ernie,
    "exaone_moe": _SIGMOID_GROUPED,
    "flex_olmo": _SOFTMAX_BY_FLAG,
    "flint": ByScores(score=torch.sigmoid, normalised=_FLAG),
    "gemma4_text": ByScores(
        normalised=True, expert_scale="per_expert_scale", top_k="top_k_experts"
    ),
    "glm4_moe": _SIGMOID_GROUPED,
    "glm4_moe_lite": _SIGMOID_GROUPED,
    "glm_moe_dsa": _SIGMOID_GROUPED,
    "gpt_oss": by_logits,
    "granitemoe": by_logits,
    "granitemoe_swa": by_logits,
    "granitemoehybrid": by_logits,
    "granitemoeshared": by_logits,
    "hunyuan_v1_moe": ByScores(normalised=True, top_k="moe_topk"),
    "hy_v3": _BIASED(epsilon=1e-20, scale="router_scaling_factor"),
    "hy_v4": _SIGMOID_GROUPED,
    "inkling2_text": _BIASED(epsilon=1e-20, scale=_SCALE),
    "inkling_text": inkling,
    "jamba": ByScores(),
    "jetmoe": by_logits,
    "kimi_linear": _SIGMOID_GROUPED,
    "kolibri1": kolibri1,
    "laguna": laguna,
    "lfm2_moe": _BIASED(
        bias="expert_bias",
        biased="use_expert_bias",
        normalised=_FLAG,
        epsilon=1e-6,
        scale=_SCALE,
    ),
    "llama4_text": llama4,
    "longcat_flash": ByScores(bias=_CORRECTION, scale=_SCALE, top_k="moe_topk"),
    "mellum": _SOFTMAX_BY_FLAG,
    "mimo_v2_flash": _SIGMOID_GROUPED,
    "minimax": _SOFTMAX_NORMALISED,
    "minimax_m2": _BIASED(),
    "minimax_m3_vl_text": _BIASED(),
    "mixtral": _SOFTMAX_NORMALISED,
    "nemotron_h": _SIGMOID_GROUPED,
    "olmoe": _SOFTMAX_BY_FLAG,
    "phimoe": sparsemixer,
    "qwen2_moe": _SOFTMAX_BY_FLAG,
    "qwen3_5_moe_text": _SOFTMAX_NORMALISED,
    "qwen3_moe": _SOFTMAX_BY_FLAG,
    "qwen3_next": _SOFTMAX_BY_FLAG,
    "qwen4_exp_text": _SOFTMAX_BY_FLAG,
    "solar_open": _SIGMOID_GROUPED,
    "zaya": zaya,
}
