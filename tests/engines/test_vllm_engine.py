"""Real vLLM engines on the CPU: the same tokens and log-probabilities as the transformers wrapper.

These tests need an environment with vLLM, which ``make engines`` builds; the others leave them out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make engines runs these")

from checkpoints import FAMILIES, PROMPTS, reference, write_base, write_repo
from starting import engine
from vllm import LLM, EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError

from steered_moe.baking import bake
from steered_moe.errors import BaseModelError, InterventionError, SteeredMoEError
from steered_moe.vllm_layers import SteeredLayers
from steered_moe.vllm_points import missing

LENGTH = 6
FORCED = {"std": 0.0, "abs": 0.0, "none": 0.0, "force": 1.0}
ASKED: dict[str, Any] = {
    "base": 0.0,
    "all": 1.0,
    "std": {"name": "std", "strength": 1.5},
    "abs": {"name": "abs", "strength": -1},
    "none": '{"name": "none"}',
    "force": {"name": "force"},
}
"""What requests ask for."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> folders of base and repo, and references; force where vLLM can."""
    folder = tmp_path_factory.mktemp("families")
    known: dict[str, tuple[Path, Path, dict[str, Any]]] = {}

    def make(family: str) -> tuple[Path, Path, dict[str, Any]]:
        if family not in known:
            force = family != "glm4_moe"
            base = write_base(family, folder / family / "base")
            repo = write_repo(base, folder / family / "repo", force)
            asked = {k: v for k, v in ASKED.items() if force or k != "force"}
            strengths = {k: strengths_of(k, force) for k in asked}
            known[family] = (
                base,
                repo,
                {k: reference(repo, v, LENGTH) for k, v in strengths.items()},
            )
        return known[family]

    return make


def strengths_of(name: str, force: bool) -> dict[str, float]:
    """What `ASKED` means, by name of steering."""
    names = ("std", "abs", "none", "force")[: 4 if force else 3]
    if name in ("base", "all"):
        return dict.fromkeys(names, 0.0 if name == "base" else 1.0)
    return dict.fromkeys(names, 0.0) | {name: {"std": 1.5, "abs": -1.0}.get(name, 1.0)}


def answer(llm: LLM, asked: list[Any], prompts: Any = PROMPTS) -> list[list[Any]]:
    """Each prompt under each of ``asked``, in one batch: tokens, log-probabilities, cached."""
    params = [
        SamplingParams(temperature=0, max_tokens=LENGTH, logprobs=1, detokenize=False,
                       ignore_eos=True,
                       extra_args=None if one is None else {"steered_moe": one})
        for one in asked for _ in prompts
    ]  # fmt: skip
    texts = [{"prompt_token_ids": list(prompt)} for _ in asked for prompt in prompts]
    found = llm.generate(texts, params, use_tqdm=False)
    rows = [
        (list(one.outputs[0].token_ids),
         [max(x.logprob for x in step.values()) for step in one.outputs[0].logprobs],
         one.num_cached_tokens)
        for one in found
    ]  # fmt: skip
    return [rows[i : i + len(prompts)] for i in range(0, len(rows), len(prompts))]


def check(found: list[Any], expected: list[Any]) -> None:
    """Tokens are equal, log-probabilities within 1e-3."""
    assert [tokens for tokens, _, _ in found] == [tokens for tokens, _ in expected]
    for (_, mine, _), (_, theirs) in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


def check_mixed(llm: LLM, references: dict[str, Any]) -> None:
    """All strengths in one batch, each as in a model of its own; and they do differ.

    One of them is absurdly large, which must not reach the others.
    """
    names = list(references)
    asked = [ASKED[name] for name in names]
    answers = answer(llm, [{"name": "std", "strength": 1e30}, *asked])
    assert all(math.isfinite(value) for _, values, _ in answers[0] for value in values)
    for name, found in zip(names, answers[1:], strict=True):
        check(found, references[name])
        if name != "base":
            with pytest.raises(AssertionError):
                check(found, references["base"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_has_the_answers_of_transformers(made: Any, family: str) -> None:
    base, repo, references = made(family)
    with engine(base, repo) as llm:
        check_mixed(llm, references)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_too(made: Any, family: str) -> None:
    base, repo, references = made(family)
    with engine(base, repo, enforce_eager=False) as llm:
        check_mixed(llm, references)
        check(answer(llm, [None])[0], references["all"])
        llm.collective_rpc("steered_moe_set", args=(0.0,))
        check(answer(llm, [None])[0], references["base"])


def test_two_processes_of_tensor_parallelism_too(made: Any) -> None:
    base, repo, references = made("qwen3_moe")
    with engine(base, repo, tensor_parallel_size=2) as llm:
        check_mixed(llm, references)
        states = llm.collective_rpc("steered_moe_state")
        assert [state["layers"] for state in states] == [[1, 2, 3]] * 2


def test_each_stage_of_a_pipeline_steers_its_own_layers(made: Any) -> None:
    """Answers cannot be compared: vLLM 0.32's own pipeline dies at its first step on a CPU."""
    base, repo, _ = made("qwen3_moe")
    with engine(base, repo, pipeline_parallel_size=2) as llm:
        states = llm.collective_rpc("steered_moe_state")
        assert [state["layers"] for state in states] == [[1], [2, 3]]


@pytest.mark.parametrize("apart", [False, True], ids=["in this process", "in its own"])
def test_the_default_can_be_changed_and_cached_prefixes_never_mix(made: Any, apart: bool) -> None:
    base, repo, references = made("olmoe")
    prompt = [list(range(10, 110))]  # three blocks of the cache
    with engine(base, repo, apart=apart) as llm:
        check(answer(llm, [None])[0], references["all"])
        for strength, name in ((0.0, "base"), (FORCED, "force"), (1.0, "all")):
            answer(llm, [None], prompt)
            assert answer(llm, [None], prompt)[0][0][2] >= 64  # from the cache
            llm.collective_rpc("steered_moe_set", args=(strength,))
            assert answer(llm, [None], prompt)[0][0][2] == 0  # which is empty now
            check(answer(llm, [None])[0], references[name])
        [first] = answer(llm, [0.25], prompt)[0]
        [again] = answer(llm, [0.25], prompt)[0]
        [other] = answer(llm, [0.5], prompt)[0]
        assert (first[2], other[2]) == (0, 0)
        assert again[2] >= 64
        assert again[:2] == (first[0], pytest.approx(first[1], abs=1e-5))
        assert other[1] != pytest.approx(first[1], abs=1e-3)
        with pytest.raises(Exception, match="no steering named 'x'"):
            llm.collective_rpc("steered_moe_set", args=({"x": 1.0},))
        check(answer(llm, [None])[0], references["all"])


def test_requests_that_ask_for_nonsense_are_refused(made: Any) -> None:
    base, repo, references = made("mixtral")
    with engine(base, repo) as llm:
        for asked, told in (
            ({"nam": "std"}, "no field 'nam'; it has strength, name"),
            ({"name": "other"}, "no steering named 'other'; there is std, abs, none, force"),
            ("much", "no JSON"),
            (float("nan"), "must be finite"),
            ([1.0, 2.0], "give one number"),
            ({}, "is empty"),
            (3e38, "strength times weight is not finite"),
        ):
            with pytest.raises(VLLMValidationError, match=told):
                answer(llm, [asked])
            check(answer(llm, [None])[0], references["all"])  # and the engine goes on


def test_an_engine_that_is_not_configured_is_as_it_was(made: Any) -> None:
    base, _, references = made("granitemoe")
    with engine(base, None) as llm:
        check(answer(llm, [None])[0], references["base"])
        with pytest.raises(VLLMValidationError, match="this engine steers nothing"):
            answer(llm, [1.0])
        with pytest.raises(Exception, match="this engine steers nothing"):
            llm.collective_rpc("steered_moe_state")
        assert llm.collective_rpc("steered_moe_touched") == [[]]


def test_a_baked_checkpoint_needs_nothing_of_ours(made: Any, tmp_path: Path) -> None:
    _, repo, references = made("gpt_oss")
    bake(str(repo), tmp_path / "baked", steering="none")
    with engine(tmp_path / "baked", None) as llm:
        check(answer(llm, [None])[0], references["none"])
        with pytest.raises(AssertionError):
            check(answer(llm, [None])[0], references["base"])


def test_what_cannot_be_steered_is_refused_at_start(made: Any) -> None:
    base, repo, _ = made("qwen3_moe")
    other = made("glm4_moe")
    with pytest.raises(BaseModelError, match="made for a 'glm4_moe' model"), engine(base, other[1]):
        pass
    with pytest.raises(SteeredMoEError, match="no field 'repo'"), \
         engine(base, repo, additional_config={"steered_moe": {"repo": str(repo)}}):  # fmt: skip
        pass


def test_force_in_a_router_with_a_correction_bias_is_refused(made: Any, tmp_path: Path) -> None:
    base = made("glm4_moe")[0]
    repo = write_repo(base, tmp_path, force=True)
    told = r"layer 1 \(model.layers.1.mlp.experts\) ranks experts by more than their logits"
    with pytest.raises(InterventionError, match=told), engine(base, repo):
        pass


def test_experts_that_transformers_selects_are_refused(
    made: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the transformers backend of vLLM some families hand logits over, and others do not.

    It changes classes of transformers, so it stays out of this process.
    """
    base, repo, references = made("olmoe")
    with engine(base, repo, apart=True, model_impl="transformers") as llm:
        check_mixed(llm, references)
    base, repo, _ = made("granitemoe")
    with pytest.raises(Exception, match="failed"), \
         engine(base, repo, apart=True, model_impl="transformers"):  # fmt: skip
        pass
    assert "selects its experts in transformers" in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("method", "told"),
    [("install", r"layers \[2\] have no router"), ("_steered", "the edit of .* did not run")],
)
def test_a_layer_that_is_skipped_is_refused(
    made: Any, monkeypatch: pytest.MonkeyPatch, method: str, told: str
) -> None:
    """As by a model that builds a layer in a way of its own, and by a kernel that goes around."""
    base, repo, _ = made("olmoe")
    original = getattr(SteeredLayers, method)

    def skipping(self: Any, runner: Any, layer: int, *given: Any) -> Any:
        if layer != 2:
            return original(self, runner, layer, *given)
        return given[-1] if given else None

    monkeypatch.setattr(SteeredLayers, method, skipping)
    with pytest.raises(InterventionError, match=told), engine(base, repo):
        pass


def test_a_draft_model_is_refused(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second layer of the same number is one of a draft model."""
    base, repo, _ = made("olmoe")
    original = SteeredLayers.install

    def twice(self: Any, runner: Any, layer: int) -> None:
        original(self, runner, layer)
        self.layers[layer + 1] = runner

    monkeypatch.setattr(SteeredLayers, "install", twice)
    with pytest.raises(InterventionError, match="a MoE layer of a draft model"), engine(base, repo):
        pass


def test_strengths_take_turns_in_few_places(made: Any) -> None:
    base, repo, _ = made("olmoe")
    with engine(base, repo, max_num_seqs=2) as llm:
        for pair in ((0.25, 0.5), (0.75, 1.25), (-1.0, 0.25)):
            found = answer(llm, list(pair), PROMPTS[:1])
            for strength, mine in zip(pair, found, strict=True):
                check(mine, reference(repo, strength, LENGTH, PROMPTS[:1]))


def test_a_prefix_of_the_changed_default_is_not_that_of_a_request(made: Any) -> None:
    base, repo, _ = made("olmoe")
    prompt = [list(range(10, 110))]
    with engine(base, repo) as llm:
        llm.collective_rpc("steered_moe_set", args=(0.0,))
        answer(llm, [None], prompt)
        [own] = answer(llm, [1.0], prompt)[0]  # the strength that the default began with
        assert own[2] == 0
        check([own], reference(repo, 1.0, LENGTH, prompt))


def test_a_change_reaches_requests_that_are_running(made: Any) -> None:
    base, repo, _ = made("olmoe")
    prompt = list(range(10, 110))
    with engine(base, repo) as llm:
        params = SamplingParams(temperature=0, max_tokens=LENGTH, logprobs=1, detokenize=False,
                                ignore_eos=True)  # fmt: skip
        core = llm.llm_engine
        core.add_request("running", {"prompt_token_ids": prompt}, params)
        steps = [core.step() for _ in range(3)]
        begun = list(steps[-1][0].outputs[0].token_ids)
        assert 0 < len(begun) < LENGTH
        llm.collective_rpc("steered_moe_set", args=(0.0,))
        done: list[Any] = []
        while core.has_unfinished_requests():
            done = core.step() or done
        tokens = list(done[0].outputs[0].token_ids)
    rest = LENGTH - len(begun)
    [(before, _)] = reference(repo, 1.0, LENGTH, [prompt])
    [(after, _)] = reference(repo, 0.0, rest, [prompt + begun])
    assert tokens == begun + after
    assert tokens[: len(begun)] == before[: len(begun)]
    assert tokens != before  # the twin


def test_this_release_of_vllm_has_every_method_that_is_wrapped() -> None:
    assert missing() == []


def test_the_second_model_runner_is_not_taken_for_steering(made: Any) -> None:
    """Strengths of requests do not reach it, and it is vLLM's default where there is Triton."""
    base, repo, _ = made("olmoe")
    for config, told in (
        ({"steered_moe": {"repo_id": str(repo)}}, ["router steering"]),
        ({"steered_moe": {"profile": True}}, ["router steering"]),
        ({}, []),
    ):
        asked = EngineArgs(str(base), additional_config=config, dtype="float32", block_size=32)
        found = asked.create_engine_config()._get_v2_model_runner_unsupported_features()
        assert found == told
