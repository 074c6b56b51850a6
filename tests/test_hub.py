"""Share a steering and find one: the real huggingface_hub client against the local Hub server."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from typer.testing import CliRunner

from steered_moe import RouterSteering, SteeredMoEForCausalLM
from steered_moe import hub as hub_module
from steered_moe.card_text import BEGIN, own_text
from steered_moe.cli import app
from steered_moe.errors import BaseModelError, FormatError
from steered_moe.finding import find_steerings
from steered_moe.hub import fetch, pull
from steered_moe.planning import plan_push
from steered_moe.publishing import push, send
from steered_moe.results import Interval, Result, read_results, write_results
from steered_moe.storage import read_repo

IDS = torch.arange(1, 13).view(2, 6)
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def base(hub: HubServer, tiny: Path, request: pytest.FixtureRequest) -> str:
    """The tiny base model on the Hub under a name of the test's own; returns the name."""
    name = f"maker/{request.node.originalname.replace('_', '-')[:60]}"
    hub.commit(name, {path.name: path.read_bytes() for path in (tiny / "base").iterdir()})
    return name


@pytest.fixture
def repo(base: str) -> str:
    """A name that no other test pushes to."""
    return base.replace("maker/", "user/")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, base: str) -> Path:
    """A steering repo for `base`, not pinned to a commit."""
    target = tmp_path / "steering"
    target.mkdir()
    config = json.loads((tiny / "steered" / "config.json").read_text())
    config |= {"base_model_name_or_path": base, "base_model_revision": None}
    (target / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny / "steered" / "steering.safetensors", target)
    return target


@pytest.fixture
def api() -> HfApi:
    return HfApi()


def named(folder: Path, name: str, factor: float, target: Path) -> Path:
    """Another steering for the same base."""
    content = read_repo(folder)
    steering = factor * content.steerings[0]
    new = RouterSteering(name, steering.layers, steering.weights, provenance=steering.provenance)
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    entry = config["steerings"][0] | {"name": name, "strength": 1.0}
    new.save(target)
    (target / "config.json").write_text(json.dumps(config | {"steerings": [entry]}))
    return target


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_push_is_one_commit_with_everything_that_belongs_to_it(
    hub: HubServer, api: HfApi, folder: Path, base: str, repo: str, caplog
):
    for name in ("secrets.env", "model.safetensors", "notes/private.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "link.png").symlink_to(folder / "secrets.env")
    commit = push(folder, repo, commit_message="First")
    files = set(api.list_repo_files(repo)) - {".gitattributes"}
    assert files == {"config.json", "steering.safetensors", "README.md", "plots/middle.png"} | (
        TOKENIZER
    )
    assert "link.png, model.safetensors, notes/private.txt, secrets.env" in caplog.text
    assert [c.title for c in api.list_repo_commits(repo)] == ["First", "initial commit"]
    assert commit.oid == api.model_info(repo).sha
    saved = read_repo(fetch(repo)).base
    assert saved["base_model_revision"] == api.model_info(base).sha
    card = Path(api.hf_hub_download(repo, "README.md")).read_text()
    assert f'from_pretrained("{repo}")' in card
    assert api.model_info(base).sha in card


def test_it_loads_in_every_way_that_the_card_names(folder: Path, repo: str, tiny: Path):
    push(folder, repo)
    model = SteeredMoEForCausalLM.from_pretrained(repo)
    expected = logits(SteeredMoEForCausalLM.from_pretrained(folder, base_model=tiny / "base"))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(repo)), expected)
    tokenizer = AutoTokenizer.from_pretrained(repo)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny / "base").get_vocab()
    generator = pipeline("text-generation", model=repo)
    answer = generator("the quick", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    inputs = tokenizer("the quick", return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer == tokenizer.decode(tokens[0], skip_special_tokens=True)
    with model.unsteered():
        assert not torch.equal(logits(model), expected)


def test_by_tag_commit_branch_and_pull_request(folder: Path, repo: str, api: HfApi, tmp_path: Path):
    first = push(folder, repo, tag="v1")
    other = named(folder, "other", -1.0, tmp_path / "other")
    proposed = push(other, repo, create_pr=True)
    assert proposed.pr_revision == "refs/pr/1"
    assert RouterSteering.load(repo).name == "middle"
    for revision in ("v1", first.oid, "main"):
        assert RouterSteering.load(f"{repo}@{revision}").name == "middle"
    assert RouterSteering.load(repo, revision="refs/pr/1").name == "other"
    assert RouterSteering.load(f"hf://{repo}@refs/pr/1").name == "other"
    push(other, repo, revision="experiment")
    assert SteeredMoEForCausalLM.from_pretrained(f"{repo}@experiment").steering.name == "other"
    assert RouterSteering.load(repo).name == "middle"
    with pytest.raises(FormatError, match="has a tag 'v1' already"):
        push(other, repo, tag="v1")
    with pytest.raises(FormatError, match="cannot be put on a pull request"):
        push(other, repo, tag="v2", create_pr=True)
    with pytest.raises(RevisionNotFoundError):
        RouterSteering.load(repo, revision="v9")
    with pytest.raises(FormatError, match="names revision v1 and revision='v2'"):
        fetch(f"{repo}@v1", "v2")


def test_a_private_repo_needs_a_token(
    folder: Path, repo: str, base: str, api: HfApi, tmp_path: Path
):
    push(folder, repo, private=True)
    assert api.model_info(repo).private
    assert RouterSteering.load(repo).name == "middle"
    with pytest.raises(RepositoryNotFoundError, match="401"):
        fetch(repo, token=False, cache_dir=tmp_path)
    assert repo in [one.repo_id for one in find_steerings(base)]
    assert repo not in [one.repo_id for one in find_steerings(base, token=False)]


def test_gated_and_private_bases_give_the_hubs_own_advice(
    hub: HubServer, folder: Path, repo: str, base: str, tmp_path: Path
):
    push(folder, repo)
    hub.gated.add(base)
    with pytest.raises(OSError, match="gated repo") as caught:
        SteeredMoEForCausalLM.from_pretrained(repo, cache_dir=tmp_path / "cache")
    assert base in str(caught.value)
    with pytest.raises(GatedRepoError):
        push(folder, f"{repo}-again")
    hub.gated.discard(base)
    assert not HfApi().repo_exists(f"{repo}-again")


def test_an_update_keeps_what_was_written_by_hand(
    api: HfApi, folder: Path, repo: str, tmp_path: Path
):
    push(folder, repo)
    card = Path(api.hf_hub_download(repo, "README.md")).read_text()
    edited = card.replace(BEGIN, f"My words, in any script: สวัสดี.\n\n{BEGIN}").replace(
        "library_name", "license: mit\nlibrary_name"
    )
    api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=repo)
    config = json.loads((folder / "config.json").read_text())
    config["steerings"][0]["strength"] = 0.125
    (folder / "config.json").write_text(json.dumps(config))
    push(folder, repo)
    again = Path(api.hf_hub_download(repo, "README.md")).read_text()
    assert own_text(again) == "My words, in any script: สวัสดี."
    assert "license: mit" in again
    assert "| strength | `0.125` |" in again
    (folder / "README.md").write_text("Other words here.")
    with pytest.raises(FormatError, match="both have text of their own"):
        push(folder, repo)
    push(folder, repo, replace_card=True)
    assert own_text(Path(api.hf_hub_download(repo, "README.md")).read_text()) == "Other words here."


def test_results_go_along_and_stay_while_the_steering_is_the_same(
    api: HfApi, folder: Path, repo: str, tmp_path: Path
):
    steering = read_repo(folder).steerings[0]
    told = {"task": "MGSM", "language": "sw", "metric": "accuracy", "items": 250}
    measured = Result(
        steering.name,
        steering.fingerprint,
        2.0,
        base=0.5,
        steered=0.51,
        gain=Interval(1.0, -1.0, 3.0),
        dataset="juletxara/mgsm",
        **told,
    )
    write_results([measured], folder)
    push(folder, repo)
    scores = Path(api.hf_hub_download(repo, ".eval_results/juletxara--mgsm.yaml")).read_text()
    assert "value: 51.0" in scores
    card = ModelCard(Path(api.hf_hub_download(repo, "README.md")).read_text())
    assert card.data.eval_results[0].metric_value == 0.51
    (folder / "evaluation.json").unlink()
    push(folder, repo)  # from somewhere else, the same steering: what was measured still holds
    assert "evaluation.json" in api.list_repo_files(repo)
    push(named(folder, "other", 0.5, tmp_path / "other"), repo)
    left = api.list_repo_files(repo)
    assert not any("eval" in name or name == "plots/middle.png" for name in left)
    assert "plots/other.png" in left


def test_of_two_writers_the_second_gets_the_conflict(
    api: HfApi, folder: Path, repo: str, tmp_path: Path
):
    push(folder, repo)
    first = plan_push(folder, repo)
    second = plan_push(named(folder, "other", 0.5, tmp_path / "other"), repo)
    config = first.files["config.json"].replace(b'"strength": 2.0', b'"strength": 0.25')
    send(type(first)(**(vars(first) | {"files": {**first.files, "config.json": config}})))
    head = api.model_info(repo).sha
    with pytest.raises(HfHubHTTPError, match="412"):
        send(second)
    assert api.model_info(repo).sha == head
    assert read_repo(fetch(repo)).strengths == [0.25]
    send(plan_push(tmp_path / "other", repo))  # planned anew, it goes through
    assert RouterSteering.load(repo).name == "other"


OFFLINE = """
import sys
import torch
from steered_moe import RouterSteering, SteeredMoEForCausalLM
model = SteeredMoEForCausalLM.from_pretrained(sys.argv[1])
print(float(model(torch.arange(1, 13).view(2, 6)).logits.double().sum()))
try:
    RouterSteering.load("user/never-seen")
except OSError as error:
    print(type(error).__name__)
"""


def test_the_second_load_works_offline(hub: HubServer, folder: Path, repo: str, tmp_path: Path):
    push(folder, repo)
    home = {"HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", OFFLINE, repo]
    run = {"capture_output": True, "text": True, "check": True}
    once = subprocess.run(command, env=os.environ | home, **run).stdout.split()
    hub.requests.clear()
    offline = os.environ | home | {"HF_HUB_OFFLINE": "1"}
    again = subprocess.run(command, env=offline, **run).stdout.split()
    assert once[1] == "RepositoryNotFoundError"
    assert again == [once[0], "LocalEntryNotFoundError"]
    assert not hub.requests


def test_only_the_small_files_are_fetched_before_the_base_is(
    hub: HubServer, folder: Path, repo: str, tmp_path: Path
):
    push(folder, repo)
    hub.requests.clear()
    RouterSteering.load(repo)
    cache = tmp_path / "cache"
    fetch(repo, cache_dir=cache)
    gets = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    names = {line.rpartition("/")[2] for line in gets}
    assert names == {"config.json", "steering.safetensors"}
    sizes = [path.stat().st_size for path in cache.rglob("*") if path.is_file()]
    assert sum(sizes) < 10_000


def test_both_files_are_of_one_commit(
    hub: HubServer, folder: Path, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    push(folder, repo)
    other = named(folder, "middle", -1.0, tmp_path / "other")
    download, pushed = hub_module._download, []

    def interrupted(name: str, file: str, *args: object, **kwargs: object) -> Path:
        path = download(name, file, *args, **kwargs)
        if not pushed:  # somebody pushes between the two files
            pushed.append(push(other, repo))
        return path

    monkeypatch.setattr(hub_module, "_download", interrupted)
    found = read_repo(fetch(repo, cache_dir=tmp_path / "cache")).steerings
    assert found == read_repo(folder).steerings
    assert found != read_repo(fetch(repo, cache_dir=tmp_path / "cache")).steerings


def test_another_revision_of_the_base_is_told(
    hub: HubServer, folder: Path, repo: str, base: str, caplog, tmp_path: Path
):
    push(folder, repo)
    pinned = read_repo(fetch(repo)).base["base_model_revision"]
    SteeredMoEForCausalLM.from_pretrained(repo)
    assert not caplog.records
    newer = hub.commit(base, {"NOTES.md": b"newer"})
    assert SteeredMoEForCausalLM.from_pretrained(repo).base_model_revision == pinned
    assert not caplog.records
    model = SteeredMoEForCausalLM.from_pretrained(repo, base_model=base)
    assert model.base_model_revision == newer
    assert pinned in caplog.text
    assert newer in caplog.text
    caplog.clear()
    local = tmp_path / "local"
    HfApi().snapshot_download(base, revision=newer, local_dir=local)
    SteeredMoEForCausalLM.from_pretrained(repo, base_model=local)
    assert newer in caplog.text
    caplog.clear()
    HfApi().snapshot_download(base, revision=pinned, local_dir=local)
    with caplog.at_level(logging.INFO, "steered_moe"):
        SteeredMoEForCausalLM.from_pretrained(repo, base_model=local)
        assert not caplog.records
        shutil.rmtree(local / ".cache")
        SteeredMoEForCausalLM.from_pretrained(repo, base_model=local)
    assert "does not say which commit it is of" in caplog.text


def test_several_steerings_in_one_repo(folder: Path, repo: str, api: HfApi, tmp_path: Path):
    other = named(folder, "swahili", -1.0, tmp_path / "other")
    push([folder, other], repo, default="swahili")
    card = Path(api.hf_hub_download(repo, "README.md")).read_text()
    assert 'steering="swahili"' in card
    assert {"plots/middle.png", "plots/swahili.png"} <= set(api.list_repo_files(repo))
    model = SteeredMoEForCausalLM.from_pretrained(repo)
    assert list(model.steerings) == ["swahili"]
    chosen = SteeredMoEForCausalLM.from_pretrained(repo, steering="middle")
    assert list(chosen.steerings) == ["middle"]
    assert not torch.equal(logits(model), logits(chosen))
    both = SteeredMoEForCausalLM.from_pretrained(repo, steering=["middle", "swahili"])
    assert list(both.steerings) == ["middle", "swahili"]
    assert RouterSteering.load(repo).name == "swahili"
    assert RouterSteering.load(repo, "middle").name == "middle"
    with pytest.raises(FormatError, match="no steering named 'bengali'; choose one of: middle, sw"):
        SteeredMoEForCausalLM.from_pretrained(repo, steering="bengali")
    model.save_pretrained(tmp_path / "saved", base_model="org/base")
    assert read_repo(tmp_path / "saved").default is None
    auto = AutoModelForCausalLM.from_pretrained(repo)
    assert torch.equal(logits(auto), logits(model))


def test_steerings_that_do_not_go_together(folder: Path, repo: str, tmp_path: Path):
    other = named(folder, "swahili", -1.0, tmp_path / "other")
    with pytest.raises(FormatError, match="no steering named 'bengali'"):
        push([folder, other], repo, default="bengali")
    with pytest.raises(FormatError, match="two steerings are called 'middle'"):
        push([folder, folder], repo)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": "a/b"}))
    with pytest.raises(FormatError, match=r"base_model_name_or_path is '.*' and 'a/b'"):
        push([folder, other], repo)
    assert not HfApi().repo_exists(repo)


def test_a_steering_alone_can_be_pushed(hub: HubServer, folder: Path, base: str, repo: str):
    steering = read_repo(folder).steerings[0]
    steering.push_to_hub(repo, base_model=base, strength=0.5, tokenizer=False)
    model = SteeredMoEForCausalLM.from_pretrained(repo)
    assert (model.steering, model.strength) == (steering, 0.5)
    assert not TOKENIZER & set(HfApi().list_repo_files(repo))
    hub.requests.clear()
    wrong = RouterSteering("wrong", [99], steering.weights[:1])
    with pytest.raises(BaseModelError, match="layer 99"):
        wrong.push_to_hub(f"{repo}-wrong", base_model=base)
    assert not any("wrong" in line for line in hub.requests)


def test_nothing_is_sent_that_was_not_valid(hub: HubServer, folder: Path, repo: str):
    hub.requests.clear()
    good = {path: path.read_bytes() for path in folder.iterdir()}
    for name, content, says in (
        ("steering.safetensors", b"broken", "not a readable safetensors"),
        ("config.json", b"{", "not JSON"),
        ("evaluation.json", b'{"results": [{}]}', "result 0: its fields must be"),
        ("README.md", b"---\na: [\n---\n", "metadata is not YAML"),
        ("tokenizer.json", b"{}", "tokenizer would not load"),
        ("tokenizer_config.json", b'{"auto_map": {}}', "it needs code"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(FormatError, match=says):
            push(folder, repo)
        (folder / name).unlink()
        for path, data in good.items():
            path.write_bytes(data)
    assert not hub.requests
    push(folder, repo)


def test_something_else_is_never_overwritten(hub: HubServer, folder: Path, repo: str, base: str):
    head = HfApi().model_info(base).sha
    with pytest.raises(FormatError, match=r"holds something else .model_type 'qwen3_moe'"):
        push(folder, base)
    assert HfApi().model_info(base).sha == head


def test_the_tokenizer_of_a_closed_base_is_not_given_away(
    hub: HubServer, folder: Path, repo: str, base: str, caplog
):
    hub.repos[base].private = True
    push(folder, repo)
    assert not TOKENIZER & set(HfApi().list_repo_files(repo))
    assert "its tokenizer files are not sent" in caplog.text
    push(folder, f"{repo}-own", private=True)
    assert set(HfApi().list_repo_files(f"{repo}-own")) >= TOKENIZER


def test_a_base_on_the_authors_disk_is_not_loaded(hub: HubServer, tiny: Path, repo: str):
    files = {path.name: path.read_bytes() for path in (tiny / "steered").iterdir()}
    hub.commit(repo, files)
    with pytest.raises(BaseModelError, match=r"\.\./base, a folder of whoever made this steering"):
        SteeredMoEForCausalLM.from_pretrained(repo)
    model = SteeredMoEForCausalLM.from_pretrained(repo, base_model=tiny / "base")
    assert torch.equal(
        logits(model), logits(SteeredMoEForCausalLM.from_pretrained(tiny / "steered"))
    )


def test_find_by_base_author_words_and_collection(
    hub: HubServer, api: HfApi, folder: Path, repo: str, base: str
):
    push(folder, repo)
    push(folder, f"{repo}-two")
    hub.commit(f"{repo}-no-steering", {"README.md": f"---\nbase_model: {base}\n---\n".encode()})
    found = find_steerings(base)
    assert [one.repo_id for one in found] == [repo, f"{repo}-two"]
    assert {one.base_model for one in found} == {base}
    assert [one.repo_id for one in find_steerings(base, search="-TWO")] == [f"{repo}-two"]
    assert find_steerings(base, author="nobody") == []
    assert len(find_steerings(base, limit=1)) == 1
    collection = api.create_collection("Steerings", namespace="user")
    for item in (f"{repo}-two", f"{repo}-no-steering"):
        api.add_collection_item(collection.slug, item_id=item, item_type="model")
    assert [x.repo_id for x in find_steerings(collection=collection.slug)] == [f"{repo}-two"]
    assert find_steerings("a/b", collection=collection.slug) == []


def test_the_commands(hub: HubServer, folder: Path, repo: str, base: str, tmp_path: Path):
    def run(*arguments: object):
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})

    planned = run("push", repo, folder, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert f"{repo} (new)" in planned.output
    assert "steering.safetensors" in planned.output
    assert not HfApi().repo_exists(repo)
    assert not any(line.startswith(("POST", "PUT")) for line in hub.requests)
    sent = run("push", repo, folder, "--tag", "v1", "--no-tokenizer")
    assert f"{repo}/commit/" in sent.output
    assert not TOKENIZER & set(HfApi().list_repo_files(repo))
    listed = run("list", "--base-model", base)
    assert repo in listed.output
    assert "no steering repo found" in run("list", "--base-model", "a/b").output
    pulled = run("pull", f"{repo}@v1", "--out", tmp_path / "out")
    assert pulled.exit_code == 0, pulled.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "steering.safetensors", "README.md"}
    assert read_repo(tmp_path / "out").steerings == read_repo(folder).steerings
    assert "is not empty" in run("pull", repo, "--out", tmp_path / "out").output
    assert run("push", repo, tmp_path / "nothing").exit_code == 1


def test_pull_of_a_folder_copies_it(folder: Path, tmp_path: Path):
    assert pull(str(folder), tmp_path / "copy").is_dir()
    assert read_repo(tmp_path / "copy").steerings == read_repo(folder).steerings


def test_a_public_repo_stays_public_and_gets_no_private_tokenizer(
    hub: HubServer, folder: Path, repo: str, base: str
):
    hub.repos[base].private = True
    push(folder, repo)
    with pytest.raises(FormatError, match="exists and is public"):
        push(folder, repo, private=True)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    push(folder, repo)
    assert not TOKENIZER & set(HfApi().list_repo_files(repo))


def test_main_is_a_branch_of_a_new_repo_and_a_message_is_needed(folder: Path, repo: str):
    with pytest.raises(FormatError, match="commit message is empty"):
        push(folder, repo, commit_message=" ")
    assert not HfApi().repo_exists(repo)
    push(folder, repo, revision="main")
    assert RouterSteering.load(repo).name == "middle"


def test_files_of_others_stay_and_what_goes_is_said(
    api: HfApi, folder: Path, repo: str, tmp_path: Path, caplog
):
    push([folder, named(folder, "two", 0.5, tmp_path / "two")], repo)
    for path in ("plots/mine.png", ".eval_results/community.yaml"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo=path, repo_id=repo)
    caplog.clear()
    push(folder, repo)
    assert "steerings two are there no more" in caplog.text
    left = set(api.list_repo_files(repo))
    assert {"plots/mine.png", ".eval_results/community.yaml", "plots/middle.png"} <= left
    assert "plots/two.png" not in left


def test_a_repo_of_another_kind_is_not_taken_over(hub: HubServer, folder: Path, repo: str):
    hub.commit(repo, {"adapter_config.json": b"{}", "README.md": b"# LoRA"})
    with pytest.raises(FormatError, match=r"holds something else \(adapter_config.json\)"):
        push(folder, repo)
    hub.commit(f"{repo}-card", {"README.md": b"# Mine"})
    push(folder, f"{repo}-card")
    card = Path(HfApi().hf_hub_download(f"{repo}-card", "README.md")).read_text()
    assert own_text(card) == "# Mine"


def test_metadata_that_was_added_on_the_hub_stays(api: HfApi, folder: Path, repo: str):
    (folder / "README.md").write_text("My own text.")
    push(folder, repo)
    card = Path(api.hf_hub_download(repo, "README.md")).read_text()
    edited = card.replace("library_name", "license: mit\nlibrary_name", 1).encode()
    api.upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=repo)
    push(folder, repo)
    again = Path(api.hf_hub_download(repo, "README.md")).read_text()
    assert "license: mit" in again
    assert own_text(again) == "My own text."


def test_results_are_pulled_and_joined(folder: Path, repo: str, tmp_path: Path):
    other = named(folder, "two", 0.5, tmp_path / "two")
    for one in (folder, other):
        steering = read_repo(one).steerings[0]
        fields = {"task": "t", "language": "sw", "metric": "accuracy", "items": 9, "base": 0.5}
        gain = Interval(0.0, -1.0, 1.0)
        row = Result(steering.name, steering.fingerprint, 1.0, steered=0.5, gain=gain, **fields)
        write_results([row], one)
    push([folder, other], repo)
    out = pull(repo, tmp_path / "out")
    assert [row.steering for row in read_results(out)] == ["middle", "two"]


def test_only_pictures_of_the_repo_itself_are_sent(folder: Path, repo: str):
    secret = folder / "private" / "plots"
    secret.mkdir(parents=True)
    (secret / "secret.png").write_bytes(b"1")
    assert not any("secret" in path for path in plan_push(folder, repo).files)


def test_the_token_that_is_given_reads_the_base(
    hub: HubServer, folder: Path, repo: str, base: str, monkeypatch: pytest.MonkeyPatch
):
    hub.repos[base].private = True
    monkeypatch.delenv("HF_TOKEN")
    steering = read_repo(folder).steerings[0]
    with pytest.raises(OSError, match=r"not a valid model identifier|401|token"):
        steering.push_to_hub(repo, base_model=base)
    steering.push_to_hub(repo, base_model=base, token="hf_test", private=True)
    assert HfApi(token="hf_test").repo_exists(repo)
