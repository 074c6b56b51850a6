"""lm-eval's model type ``steered-moe``, the command, and the task files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DATA, ROOT, real_data
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from steered_moe import RouterSteering, SteeredMoEForCausalLM
from steered_moe.answering import answers
from steered_moe.cli import app
from steered_moe.embedded import embedded_model
from steered_moe.errors import SteeredMoEError
from steered_moe.tasks import task

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval import tasks as lm_tasks
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from steered_moe.lm_eval_model import CPU_BATCH, REFUSED, SteeredMoELM

STEERED = Path(embedded_model())
FOLDER = ROOT / "examples" / "lm_eval"
THEIRS = Path(lm_tasks.__file__).parent
TASKS = ["embedded_sw", "embedded_fr"]


def asked(model: str, model_args: str, **options: Any) -> Any:
    manager = TaskManager(include_path=FOLDER, include_defaults=False)
    given = {"limit": 6, "apply_chat_template": True, "batch_size": 3, "device": "cpu", **options}
    return simple_evaluate(
        model=model, model_args=model_args, tasks=TASKS, task_manager=manager,
        bootstrap_iters=0, log_samples=True, **given,
    )  # fmt: skip


def said(results: Any) -> dict[str, list[str]]:
    return {
        name: [row["resps"][0][0] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in results["samples"].items()
    }


@pytest.fixture(scope="module")
def bans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with half of the experts of four layers forbidden: answers change."""
    base = STEERED.parent / "base"
    experts = AutoConfig.from_pretrained(base).num_experts
    force = torch.zeros(4, experts)
    force[:, : experts // 2] = -1
    steering = RouterSteering("bans", torch.arange(2, 6), torch.zeros(4, experts), force)
    folder = tmp_path_factory.mktemp("bans")
    SteeredMoEForCausalLM.from_base(base, steering).save_pretrained(folder)
    return folder


# The model type


def test_strength_0_is_lm_evals_own_model_and_a_steering_is_the_librarys(bans: Path) -> None:
    base = said(asked("hf", f"pretrained={STEERED.parent / 'base'},dtype=float32"))
    assert said(asked("steered-moe", f"pretrained={bans},dtype=float32,strength=0")) == base
    results = asked("steered-moe", f"pretrained={bans},dtype=float32")
    assert said(results) != base
    model = SteeredMoEForCausalLM.from_pretrained(bans, dtype=torch.float32)
    by_hand = asked_of(model)
    assert by_hand == said(results)


def asked_of(model: SteeredMoEForCausalLM) -> dict[str, list[str]]:
    """The same tasks of a model that was loaded by hand, by our own evaluation."""
    tokenizer = AutoTokenizer.from_pretrained(STEERED.parent / "base")
    return {
        name: answers(
            model, tokenizer,
            [item.prompt for item in task("embedded").items(name[-2:], limit=6)],
            max_new_tokens=40, chat=True,
        )
        for name in TASKS
    }  # fmt: skip


def test_results_name_the_steering_its_strength_and_its_base(bans: Path) -> None:
    config = asked("steered-moe", f"pretrained={bans},dtype=float32,strength=0.5")["config"]
    steering = SteeredMoEForCausalLM.from_pretrained(bans).steerings["bans"]
    assert config["steerings"] == [
        {"name": "bans", "fingerprint": steering.fingerprint, "strength": 0.5}
    ]
    assert Path(config["base_model"]).resolve() == (STEERED.parent / "base").resolve()
    assert config["model_dtype"] == "torch.float32"
    assert config["quantization"] is None
    assert config["model_num_parameters"] > 1_000_000


def test_one_steering_of_several_can_be_asked() -> None:
    methods = STEERED.parent / "methods"
    lm = SteeredMoELM(str(methods), steering="shared", dtype="float32", device="cpu")
    assert [one["name"] for one in lm.get_model_info()["steerings"]] == ["shared"]
    with pytest.raises(SteeredMoEError, match="task-hard"):
        SteeredMoELM(str(methods), steering="none")


def test_a_base_model_can_be_loaded_in_4_bit(tiny: Path) -> None:
    pytest.importorskip("bitsandbytes")
    repo = str(tiny / "steered")
    lm = SteeredMoELM(repo, load_in_4bit=True, device_map="cpu", dtype="float32")
    assert lm.get_model_info()["quantization"] == "steered_moe_4bit"
    plain = SteeredMoELM(repo, dtype="float32", device="cpu")
    assert plain.get_model_info()["quantization"] is None


@pytest.mark.parametrize("most", [2, 64])
def test_the_batch_is_chosen_on_a_cpu(bans: Path, most: int) -> None:
    lm = SteeredMoELM(str(bans), batch_size="auto", max_batch_size=most, device="cpu")
    seen: list[int] = []
    hook = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prompts = [item.prompt for item in task("embedded").items("en", limit=20)]
    given = {"max_gen_toks": 1, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, given), i) for i, text in enumerate(prompts)]
    assert len(lm.generate_until(asked, disable_tqdm=True)) == 20
    hook.remove()
    assert max(seen) == min(most, CPU_BATCH)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *(({name: "x"}, name) for name in REFUSED),
        ({"strenght": 1.0}, "did you mean strength"),
        ({"max_cpu_memory": "1GiB"}, "needs parallelize=True or device_map=auto"),
        ({"dtype": "float23"}, "float23"),
        ({"strength": float("nan")}, "nan"),
        ({"pretrained": "./nowhere/at-all"}, "nowhere"),
        ({"pretrained": torch.nn.Linear(1, 1)}, "names no steering repo"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_would_have_no_effect_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(SteeredMoEError, match=says):
        SteeredMoELM(**{"pretrained": str(STEERED), **arguments})


def test_a_cache_of_another_strength_is_refused(bans: Path, tmp_path: Path) -> None:
    cache = {"use_cache": str(tmp_path / "cache")}
    arguments = f"pretrained={bans},dtype=float32,strength="
    first = said(asked("steered-moe", arguments + "1.0", **cache))
    assert said(asked("steered-moe", arguments + "1.0", **cache)) == first
    with pytest.raises(SteeredMoEError, match="cache of its own"):
        asked("steered-moe", arguments + "0.5", **cache)


# The command


def test_the_command_runs_lm_eval(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from steered_moe.cli import app; app()", "lm-eval",
         "--model_args", "pretrained=embedded,dtype=float32,strength=1.0",
         "--tasks", "embedded_en,embedded_sw", "--include_path", str(FOLDER),
         "--apply_chat_template", "--limit", "2", "--batch_size", "auto",
         "--output_path", str(tmp_path)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "embedded_sw" in done.stdout
    assert list(tmp_path.rglob("results_*.json"))


def test_the_command_speaks_of_itself_and_refuses_other_models() -> None:
    runner = CliRunner()
    for arguments in ([], ["--help"]):
        assert "model_args" in runner.invoke(app, ["lm-eval", *arguments]).output
    done = runner.invoke(app, ["lm-eval", "--model", "hf", "--tasks", "x"])
    assert done.exit_code == 1
    assert "--model hf" in done.output
    wrong = ["--model_args", "pretrained=embedded,strenght=2", "--tasks", "embedded_en"]
    done = runner.invoke(app, ["lm-eval", *wrong, "--include_path", str(FOLDER)])
    assert done.exit_code == 1
    assert "did you mean strength" in done.output
    assert "--apply_chat_template" in runner.invoke(app, ["lm-eval", "run", "--help"]).output
    assert "tasks" in runner.invoke(app, ["lm-eval", "ls", "--help"]).output


def test_without_lm_eval_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(app, ["lm-eval", "--tasks", "x"])
    assert done.exit_code == 1
    assert "steered-moe[lm-eval]" in done.output


# The task files


def test_the_task_files_are_those_that_the_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "write_tasks.py", tmp_path], check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in FOLDER.glob("*.yaml")}
    assert len(written) == 11 + 12


def test_the_mgsm_tasks_are_lm_evals_own_but_for_the_rows() -> None:
    theirs = read(THEIRS / "mgsm" / "direct" / "direct_yaml")
    mine = read(FOLDER / "_mgsm_direct")
    assert {name for name in {*theirs, *mine} if theirs.get(name) != mine.get(name)} <= {
        *("tag", "custom_dataset", "dataset_path", "dataset_name", "training_split"),
        *("doc_to_target", "generation_kwargs", "metadata"),
    }
    for path in FOLDER.glob("mgsm_direct_local_*.yaml"):
        own = read(THEIRS / "mgsm" / "direct" / path.name.replace("_local", ""))
        here = read(path)
        assert here["doc_to_text"] == own["doc_to_text"], path.name
        assert here["generation_kwargs"] == own["generation_kwargs"], path.name


def read(path: Path) -> dict[str, Any]:
    """A task file; the functions that it names stay words."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load(path.read_text(encoding="utf-8"), Loader)


def test_the_mgsm_tasks_say_what_they_need() -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        import local_data
    finally:
        sys.path.remove(str(FOLDER))
    with pytest.raises(ValueError, match="--metadata data=FOLDER"):
        local_data.mgsm("en")
    real_data("mgsm")
    rows = local_data.mgsm("en", data=str(DATA))["test"]
    assert len(rows) == 250
    assert rows[0]["answer_number"] == "18"
