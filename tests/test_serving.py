"""``steered-moe serve``: OpenAI clients ask base and steered model of one server."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from steered_moe import RouterSteering, SteeredMoEForCausalLM
from steered_moe.answering import answers
from steered_moe.cli import app
from steered_moe.embedded import embedded_model
from steered_moe.intervention import attached
from steered_moe.serve_command import vllm_command
from steered_moe.serving import _known, by_name
from steered_moe.storage import read_repo
from steered_moe.tasks import task

openai = pytest.importorskip("openai", reason="the server's packages are not installed")

BASE = Path(embedded_model()).parent / "base"
LONG = GenerationConfig(max_new_tokens=400, eos_token_id=0, do_sample=False).to_json_string()
"""An answer that no token ends."""
SWAHILI = [item.prompt for item in task("embedded").items("sw", limit=8)]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the experts of four layers are forbidden, so that answers differ."""
    experts = AutoConfig.from_pretrained(BASE).num_experts
    force = torch.zeros(4, experts)
    force[:, : experts // 2] = -1
    steering = RouterSteering("bans", torch.arange(2, 6), torch.zeros(4, experts), force)
    folder = tmp_path_factory.mktemp("served") / "bans"
    SteeredMoEForCausalLM.from_base(BASE, steering).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(repo: Path) -> dict[str, list[str]]:
    """Answers without a server."""
    model = SteeredMoEForCausalLM.from_pretrained(repo, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    found = {"bans": answers(model, tokenizer, SWAHILI, max_new_tokens=24, chat=True)}
    with model.unsteered():
        found["base"] = answers(model, tokenizer, SWAHILI, max_new_tokens=24, chat=True)
    assert sum(map(str.__ne__, *found.values())) >= 4
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module", params=["one by one", "continuous batching"])
def client(request: pytest.FixtureRequest, repo: Path) -> Iterator[Any]:
    port = free_port()
    batching = ["--continuous-batching", "--cache-memory", "0.05"]
    more = batching if request.param == "continuous batching" else []
    script = "from steered_moe.cli import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "serve", str(repo), "--port", str(port),
         "--dtype", "float32", *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    made = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
    try:
        _wait(made, process)
        yield made
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=30) in (0, 130)
        finally:
            process.kill()


def _wait(client: Any, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server has ended"
        try:
            client.models.list()
        except openai.APIConnectionError:
            time.sleep(0.5)
        else:
            return
    pytest.fail("the server does not answer")


def ask(client: Any, model: str, question: str, **options: Any) -> Any:
    turn = [{"role": "user", "content": question}]
    given = {"max_tokens": 24, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=turn, **given)


def test_both_names_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list().data] == ["bans", "base"]


@pytest.mark.parametrize("name", ["bans", "base"])
def test_chat_and_its_stream_have_the_answers_of_the_library(
    client: Any, expected: dict[str, list[str]], name: str
) -> None:
    for question, answer in zip(SWAHILI[:4], expected[name][:4], strict=True):
        done = ask(client, name, question)
        assert done.choices[0].message.content == answer
        assert done.usage.completion_tokens > 0
        stream = ask(client, name, question, stream=True)
        parts = [part.choices[0].delta.content or "" for part in stream]
        assert "".join(parts) == answer
        assert len(parts) > 2


def test_completions_differ_by_name(client: Any) -> None:
    texts = {
        name: client.completions.create(model=name, prompt="Tom has", max_tokens=12, temperature=0)
        for name in ("bans", "base")
    }
    assert len({found.choices[0].text for found in texts.values()}) == 2


def test_sixteen_clients_ask_both_at_once(client: Any, expected: dict[str, list[str]]) -> None:
    asked = [(("bans", "base")[i % 2], i // 2) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        said = list(pool.map(lambda one: ask(client, one[0], SWAHILI[one[1]]), asked))
    found = [one.choices[0].message.content for one in said]
    assert found == [expected[name][i] for name, i in asked]


def test_unknown_models_and_long_prompts_are_refused(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        ask(client, "nobody", "Tom")
    assert "there are bans, base" in str(error.value.response.text)
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "base", "Tom has 3 apples. " * 1000)
    told = error.value.response.text
    assert re.search(r"the prompt has \d{4,} tokens; the model's context is", told)
    assert ask(client, "base", SWAHILI[0]).choices[0].message.content


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(client: Any, stream: bool) -> None:
    """Eight long answers that nobody waits for hold up less than two would."""
    long = {"max_tokens": 400, "extra_body": {"generation_config": LONG}}
    begin = time.monotonic()
    done = ask(client, "base", "Tom has", **long)
    assert done.usage.completion_tokens == 400
    whole = time.monotonic() - begin
    for _ in range(8):
        if stream:
            answer = ask(client, "base", "Tom has", stream=True, **long)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                ask(client, "base", "Tom has", timeout=whole / 20, **long)
    begin = time.monotonic()
    ask(client, "base", "Tom has", max_tokens=4)
    assert time.monotonic() - begin < 2 * whole


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_before_a_stop_text(client: Any, stream: bool) -> None:
    """As at OpenAI, and unlike transformers, whose answer has it, or goes on in a batch."""
    whole = ask(client, "base", SWAHILI[0]).choices[0].message.content
    for stop in (whole[2:5], ["never", whole[3]]):
        first = whole.index(stop if isinstance(stop, str) else stop[1])
        found, reason = _said(ask(client, "base", SWAHILI[0], stop=stop, stream=stream), stream)
        assert (found, reason) == (whole[:first], "stop")
    assert _said(ask(client, "base", SWAHILI[0], stop="never", stream=stream), stream)[0] == whole
    given = {"model": "base", "prompt": "Tom has", "max_tokens": 12, "temperature": 0}
    text = client.completions.create(**given).choices[0].text
    stop = text[4:6]
    parts = client.completions.create(**given, stop=stop, stream=stream)
    cut = "".join(x.choices[0].text for x in parts) if stream else parts.choices[0].text
    assert cut == text[: text.index(stop)]


def _said(done: Any, stream: bool) -> tuple[str, str]:
    """The text of an answer, and why it ended."""
    if not stream:
        return done.choices[0].message.content, done.choices[0].finish_reason
    parts = [part.choices[0] for part in done]
    return "".join(one.delta.content or "" for one in parts), parts[-1].finish_reason


def test_what_the_server_would_ignore_is_refused(client: Any) -> None:
    for asked, told in (
        ({"n": 2}, "n=2 is not supported"),
        ({"logprobs": True}, "logprobs=True is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"top_p": 0.5}, "top_p=0.5 has no effect on greedy answers"),
        ({"max_tokens": "many"}, "max_tokens='many' is no int"),
        ({"temperature": True}, "temperature=True is no int or float"),
        ({"extra_body": {"messages": []}}, "give a list of one turn or more"),
        ({"extra_body": {"model": None}}, "the request has no model"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, "base", "Tom has 3 apples.", **asked)
        assert told in error.value.response.text
    harmless = {"n": 1, "logprobs": False, "user": "me", "response_format": {"type": "text"}}
    assert ask(client, "base", SWAHILI[0], **harmless).model == "base"


def test_a_temperature_samples(client: Any, request: pytest.FixtureRequest) -> None:
    """The model's own generation config is greedy."""
    if "continuous" in request.node.name:
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, "base", SWAHILI[0], temperature=5.0)
        assert "all requests sample as the first one did" in error.value.response.text
        return
    for temperature, several in ((5.0, True), (0, False)):
        said = {
            ask(client, "base", SWAHILI[0], temperature=temperature).choices[0].message.content
            for _ in range(4)
        }
        assert (len(said) > 1) == several


def test_a_name_may_look_like_one_with_a_revision() -> None:
    assert _known("user/x@main", {"user/x@main": 0}) == "user/x@main"
    assert _known("user/x@main@main", {"user/x@main": 0}) == "user/x@main"
    assert _known("user/x@main", {"user/x": 0}) == "user/x"
    assert _known("user/y", {"user/x": 0}) is None


def test_base_and_steered_share_their_weights(repo: Path) -> None:
    model = SteeredMoEForCausalLM.from_pretrained(repo, dtype=torch.float32)
    steered, base = by_name(str(repo), model).values()
    assert attached(steered)
    assert not attached(base)
    assert not isinstance(base, SteeredMoEForCausalLM)
    places = [{p.data_ptr() for p in one.parameters()} for one in (steered, base)]
    assert places[0] == places[1]
    ids = torch.tensor([[5, 9, 31, 7]])
    with steered.unsteered(), torch.no_grad():
        assert torch.equal(base(ids).logits, steered(ids).logits)
    with torch.no_grad():
        assert not torch.equal(base(ids).logits, steered(ids).logits)


def test_the_command_for_vllm_has_the_recorded_revision(repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "repo")
    found = read_repo(repo)
    pinned = {**found.base, "base_model_name_or_path": "user/base", "base_model_revision": "v2"}
    replace(found, base=pinned).write(tmp_path / "repo")
    command = vllm_command(str(tmp_path / "repo"), None, None)
    assert command[command.index("--model") : command.index("--model") + 4] == [
        "--model", "user/base", "--revision", "v2",
    ]  # fmt: skip
    extension = command[command.index("--worker-extension-cls") + 1]
    assert extension == "steered_moe.vllm_worker.WorkerExtension"
    other = vllm_command(str(tmp_path / "repo"), None, "user/copy@v3")
    assert other[other.index("--model") + 1 :][:3] == ["user/copy", "--revision", "v3"]


def test_the_command_for_vllm_names_base_and_steering(repo: Path) -> None:
    asked = ["serve", str(repo), "--engine", "vllm", "--strength", "0.5", "--dry-run"]
    done = CliRunner().invoke(app, [*asked, "--max-model-len", "512"])
    assert done.exit_code == 0, done.output
    words = shlex.split(done.output)
    assert Path(words[words.index("--model") + 1]).resolve() == BASE.resolve()
    config = json.loads(words[words.index("--additional-config") + 1])
    assert config == {"steered_moe": {"repo_id": str(repo), "strength": 0.5}}
    assert words[-2:] == ["--max-model-len", "512"]
    own = ["--additional-config", '{"other": 1}', "--seed=3"]
    words = shlex.split(CliRunner().invoke(app, [*asked, *own]).output)
    config = json.loads(words[words.index("--additional-config") + 1])
    assert config == {"other": 1, "steered_moe": {"repo_id": str(repo), "strength": 0.5}}
    assert words.count("--additional-config") == 1
    assert words[-1] == "--seed=3"
    for wrong, told in (
        (["--engine", "vllm", "--additional-config", '{"steered_moe": {}}'], "without steered_moe"),
        (["--engine", "vllm", "--additional_config=no"], "is no JSON"),
        (["--engine", "vllm", "--additional-config.steered_moe.strength", "0"], "not for here"),
        (["--engine", "vllm", "--model", "other"], "--base-model names another base"),
        (["--engine", "vllm", "--revision=v1"], "the steering repo decides it"),
        (["--engine", "other"], "there are transformers, vllm"),
        (["--engine", "vllm", "--load-in-4bit"], "is for the transformers engine"),
        (["--max-model-len", "5"], "no option --max-model-len"),
    ):
        refused = CliRunner().invoke(app, ["serve", str(repo), *wrong])
        assert refused.exit_code == 1
        assert told in refused.output
