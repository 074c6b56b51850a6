"""lm-eval's own Hugging Face model and our evaluation, item by item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DATA, ROOT, real_data
from test_corpora import jsonl, write
from tiny_random_moe import build_model, build_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_moe import RouterSteering, attach
from steered_moe.answering import answers, log_likelihoods
from steered_moe.controls import BASE, System
from steered_moe.embedded import embedded_model
from steered_moe.evaluation import Evaluation, Settings
from steered_moe.tasks import task

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval import tasks as lm_tasks
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

STEERED = Path(embedded_model())
FOLDER = ROOT / "examples" / "lm_eval"
THEIRS = Path(lm_tasks.__file__).parent
LANGUAGES = ("en", "sw", "bn", "th", "zh")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    base = STEERED.parent / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def random() -> tuple[Any, Any]:
    """A tokenizer that adds no token at the beginning; the template ends in a blank."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return build_model(), tokenizer


@pytest.fixture(scope="module")
def random_bos(random: tuple[Any, Any]) -> tuple[Any, Any]:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    assert tokenizer.encode("A") != tokenizer.encode("A", add_special_tokens=False)
    return random[0], tokenizer


def plain(loaded: tuple[Any, Any], **options: Any) -> HFLM:
    """lm-eval's own model."""
    return HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=4, **options)


def ask(lm: HFLM, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    asked = [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]
    return getattr(lm, kind)(asked, disable_tqdm=True)


def as_chat(lm: HFLM, text: str) -> str:
    return lm.apply_chat_template([{"role": "user", "content": text}])


def manager(**metadata: Any) -> TaskManager:
    return TaskManager(include_path=FOLDER, include_defaults=False, metadata=metadata)


def evaluate(model: Any, tasks: list[Any], model_args: str | None = None, **options: Any) -> Any:
    """`simple_evaluate`, with samples and without bootstrapping."""
    given = {"task_manager": manager(), "bootstrap_iters": 0, "batch_size": 4, **options}
    if model_args is not None:
        given |= {"model_args": model_args}
    return simple_evaluate(model=model, tasks=tasks, log_samples=True, **given)


def said(results: Any, name: str, which: str = "flexible-extract") -> list[tuple[str, float]]:
    """Answer and score of each item, in the order of the data."""
    rows = [row for row in results["samples"][name] if row["filter"] == which]
    rows.sort(key=lambda row: row["doc_id"])
    return [(row["resps"][0][0], float(row["exact_match"])) for row in rows]


def ours(loaded: Any, name: str, language: str, folder: Path, **options: Any) -> dict[str, Any]:
    """The base model's records of our own evaluation, by id."""
    data = options.pop("data", None)
    run = Evaluation(
        *loaded, [task(name)], [language], [System(BASE)], Settings(batch_size=3, **options), data
    )
    return {row["id"]: row for row in run.run(folder).read()}


# Item by item: lm-eval's own model and ours


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_and_scores_of_the_embedded_problems_are_those_of_lm_eval(
    embedded: Any, language: str, tmp_path: Path
) -> None:
    name = f"embedded_{language}"
    options = {"limit": 10, "apply_chat_template": True}
    theirs = said(evaluate(plain(embedded), [name], **options), name)
    mine = ours(embedded, "embedded", language, tmp_path, limit=10)
    items = task("embedded").items(language, limit=10)
    assert [(mine[item.id]["answer"], mine[item.id]["score"]) for item in items] == theirs
    handle = attach(embedded[0], steering_of(embedded[0]))  # what is compared can differ
    other = said(evaluate(plain(embedded), [name], **options), name)
    handle.remove()
    assert sum(a != b for a, b in zip(other, theirs, strict=True)) >= 3


PROMPTS = [
    "A router sends each token",
    "Un routeur envoie",
    "Kipanga",
    "Ein Router schickt jedes Wort des Textes zu wenigen",
    "A router sends ",
]


@pytest.mark.parametrize("kind", ["random", "random_bos"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_answers_of_a_random_model_are_those_of_lm_eval(
    kind: str, chat: bool, request: pytest.FixtureRequest
) -> None:
    loaded = request.getfixturevalue(kind)
    lm = plain(loaded)
    for stops in ((), ("e",), ("zz", "r")):
        given = {"until": list(stops), "max_gen_toks": 12, "do_sample": False}
        texts = [as_chat(lm, text) if chat else text for text in PROMPTS]
        theirs = ask(lm, "generate_until", [(text, given) for text in texts])
        mine = answers(*loaded, PROMPTS, stops=stops, max_new_tokens=12, chat=chat)
        assert mine == theirs
        assert len(set(mine)) > 2
    different = answers(*loaded, PROMPTS, max_new_tokens=12, chat=not chat)
    assert different != answers(*loaded, PROMPTS, max_new_tokens=12, chat=chat)
    with System("s", steering_of(loaded[0])).on(loaded[0]):
        assert answers(*loaded, PROMPTS, stops=stops, max_new_tokens=12, chat=chat) != theirs


def steering_of(model: Any) -> RouterSteering:
    """Forbids half of the experts in four layers."""
    experts = model.config.num_experts
    force = torch.zeros(4, experts)
    force[:, : experts // 2] = -1
    return RouterSteering("bans", torch.arange(2, 6), torch.zeros(4, experts), force)


CONTEXTS = [
    "A router sends each token of a text",
    "Un routeur envoie chaque mot",
    "Kipanga njia hutuma ",  # lm-eval gives the blank to what follows
    "Ein Router\n",
    "",
]
CONTINUATIONS = [" A", " B", " to a few of its many experts.", "sends", "\n\nA router"]


@pytest.mark.parametrize("kind", ["embedded", "random", "random_bos"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_log_likelihoods_are_those_of_lm_eval(
    kind: str, chat: bool, request: pytest.FixtureRequest
) -> None:
    loaded = request.getfixturevalue(kind)
    lm = plain(loaded)
    pairs = [(context, text) for context in CONTEXTS for text in CONTINUATIONS]
    texts = [(as_chat(lm, context) if chat else context, text) for context, text in pairs]
    theirs = [value for value, _ in ask(lm, "loglikelihood", texts)]
    mine = log_likelihoods(*loaded, pairs, chat=chat)
    assert mine == pytest.approx(theirs, abs=1e-4)
    assert log_likelihoods(*loaded, pairs, chat=not chat) != pytest.approx(theirs, abs=1e-2)
    with System("s", steering_of(loaded[0])).on(loaded[0]):
        steered = log_likelihoods(*loaded, pairs, chat=chat)
    assert all(abs(a - b) > 1e-3 for a, b in zip(steered, theirs, strict=True))


ROWS = [
    {"link": f"https://b.org/{i}", "question_number": 1 + i % 2, "question": f" Which, {i}? ",
     "passage": PROMPTS[i % 4], "choices": [f"expert {i + j}" for j in range(4)],
     "answer": 1 + i % 4}
    for i in range(12)
]  # fmt: skip


def their_belebele() -> dict[str, Any]:
    """lm-eval's own task, with our rows under the names that they have on the Hub."""
    config = yaml.safe_load((THEIRS / "belebele" / "_default_template_yaml").read_text())
    docs = [
        {**row, "flores_passage": row["passage"], "correct_answer_num": str(row["answer"])}
        | {f"mc_answer{i}": text for i, text in enumerate(row["choices"], 1)}
        for row in ROWS
    ]
    from datasets import Dataset

    data = {"test": Dataset.from_list(docs)}
    own = {"task": "belebele_here", "test_split": "test", "custom_dataset": lambda **_: data}
    return config | own


@pytest.mark.parametrize("kind", ["embedded", "random", "random_bos"])
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_belebele_has_the_scores_of_lm_evals_own_task(
    kind: str, chat: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    loaded = request.getfixturevalue(kind)
    data = write(tmp_path / "data", {"belebele/eng_Latn.jsonl": jsonl(ROWS)})
    mine = ours(loaded, "belebele", "en", tmp_path / "run", data=data, part="all", chat=chat)
    samples = evaluate(plain(loaded), [their_belebele()], apply_chat_template=chat)["samples"]
    rows = {f"{r['doc']['link']}#{r['doc']['question_number']}": r
            for r in samples["belebele_here"]}  # fmt: skip
    assert mine.keys() == rows.keys()
    for name, row in rows.items():
        theirs = [value for value, _ in row["filtered_resps"]]
        assert mine[name]["log_likelihoods"] == pytest.approx(theirs, abs=1e-4)
        assert mine[name]["score"] == row["acc"]
    assert 0 < sum(row["score"] for row in mine.values()) < 12
    other = ours(loaded, "belebele", "en", tmp_path / "2", data=data, part="all", chat=not chat)
    different = [
        abs(a - b)
        for name in mine
        for a, b in zip(mine[name]["log_likelihoods"], other[name]["log_likelihoods"], strict=True)
    ]
    assert sorted(different)[len(different) // 2] > 1e-2


@pytest.mark.parametrize("language", ["bn", "en"])
def test_mgsm_has_the_prompts_answers_and_scores_of_lm_eval(
    embedded: Any, language: str, tmp_path: Path
) -> None:
    real_data("mgsm")
    name = f"mgsm_direct_local_{language}"
    tasks = manager(data=str(DATA))
    results = evaluate(plain(embedded), [name], task_manager=tasks, limit=4)
    mine = ours(embedded, "mgsm_direct", language, tmp_path, data=DATA, limit=4, part="all")
    items = {item.id: item for item in task("mgsm_direct").items(language, DATA, 4, "all")}
    theirs = said(results, name)
    assert [(mine[name]["answer"], mine[name]["score"]) for name in items] == theirs
    rows = {str(row["doc_id"]): row for row in results["samples"][name]}
    assert {i: row["arguments"][0][0] for i, row in rows.items()} == {
        i: item.prompt for i, item in items.items()
    }
    assert {i: row["target"] for i, row in rows.items()} == {i: t.target for i, t in items.items()}
    assert rows["0"]["arguments"][0][1]["until"] == list(task("mgsm_direct").stops(language))
    assert len({text for text, _ in theirs}) > 2
