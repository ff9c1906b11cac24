"""Text from a run: the cache of keys and values, greedy and drawn tokens, and the command that streams them."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import supar_cli
from supar_cli.errors import InputError, UnusableResult
from supar_cli.exporting import generate, loaded_model
from supar_cli.models import transformer
from supar_cli.planning.plan import Plan
from tests.conftest import Called, environment
from tests.test_loaded_model import train
from tests.test_model import MODELS, SHAPE, T, filled, tokens
from tests.test_tokenizer import by_level

MakePlan = Callable[..., Plan]
Supar = Callable[..., Called]

CONTEXT = 16
STORY = "aé€𝄞z"  # characters of 1, 2, 3 and 4 bytes
LETTERS = (
    "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=50)) * 240
)  # its next letter needs several before

# ------------------------------------------------------------------------------------------------ the cache

MODELS_TRIED = [
    *MODELS.values(),
    *({"positions": at, "kv_heads": kv} for at, kv in product(("learned", "rope", "alibi"), (1, 2, 4))),
]
NOW = "now, so_far = slice(before, before + T)"
FAULTS = {  # in the text of transformer.py, and what stands there instead
    "positions that don't move on": (NOW, "now, so_far = slice(0, T)"),
    "an offset of one": (NOW, "now, so_far = slice(before - bool(before), before - bool(before) + T)"),
    "a mask of the first tokens": (".triu(before + 1)", ".triu(1)"),
    "a mask that hides the token itself": (".triu(before + 1)", ".triu(max(before, 1))"),
    "no mask": ("None if cache is None else causal_bias(T, before, tokens_BT.device)", "None"),
    "keys of the past behind": (
        "torch.cat((self._parts[0], k_BKTE), dim=2)",
        "torch.cat((k_BKTE, self._parts[0]), dim=2)",
    ),
    "values of the past behind": (
        "torch.cat((self._parts[1], v_BKTE), dim=2)",
        "torch.cat((v_BKTE, self._parts[1]), dim=2)",
    ),
}


def chunkings() -> list[list[int]]:
    """Ways to cut T tokens: all, one at a time, a prompt and then one at a time, and drawn ones."""
    draws, found = random.Random(0), [[T], [1] * T, [5, *[1] * (T - 5)]]
    for _ in range(4):
        ends = [0, *sorted(draws.sample(range(1, T), 3)), T]
        found.append([end - start for start, end in pairwise(ends)])
    return found


def cache_errors(plan: Plan, module: Any) -> list[float]:
    """The largest error of logits read with a cache, relative to the largest logit, for each way to cut the tokens."""
    whole, _ = filled(plan)
    model = module.Transformer(plan.model).double()
    model.load_state_dict(whole.state_dict())
    index_BT, found = torch.from_numpy(tokens(plan)), []
    with torch.no_grad():
        wanted = whole(index_BT)
        for sizes in chunkings():
            cache = model.new_cache()
            parts = [model(part, cache=cache) for part in index_BT.split(sizes, dim=1)]
            found.append(float((torch.cat(parts, dim=1) - wanted).abs().max() / wanted.abs().max()))
    return found


@pytest.mark.parametrize("changes", MODELS_TRIED, ids=str)
def test_a_cache_changes_no_logit(plan_of: MakePlan, changes: dict[str, Any]) -> None:
    plan = plan_of(model={**SHAPE, **changes}, target={"width": None})
    assert max(cache_errors(plan, transformer)) < 1e-10


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_cache_changes_them(plan_of: MakePlan, fault: str) -> None:
    right, wrong = FAULTS[fault]
    source = Path(transformer.__file__).read_text("utf-8")
    assert source.count(right) == 1
    planted = ModuleType("planted_transformer")
    exec(compile(source.replace(right, wrong), "planted_transformer.py", "exec"), vars(planted))
    for positions in ("learned", "rope"):
        plan = plan_of(model={**SHAPE, "positions": positions, "kv_heads": 2}, target={"width": None})
        assert max(cache_errors(plan, planted)) > 1e-3, positions


# ------------------------------------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned documents by heart: the story, over and over."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "data.jsonl").write_text(json.dumps({"text": STORY}) + "\n", "utf-8")
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text("utf-8") * 60, "utf-8")
    return train(folder / "data.jsonl", folder / "runs/story", train={"steps": 80}, model={"context": CONTEXT})


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one text, without an end."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "text.txt").write_text(LETTERS)
    model = {"family": "llama", "kv_heads": 1, "context": CONTEXT}
    return train(folder / "text.txt", folder / "runs/letters", train={"steps": 40}, model=model)


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest tokens that follow, by a pass over all of them for each: of the newest half, once they are too many."""
    start, ids = 0, list(ids)
    for _ in range(count):
        if len(ids) - start > CONTEXT:
            start = len(ids) - CONTEXT // 2
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[start:]]))[0, -1].argmax()))
    return ids


def text_of(run: Path, prompt: str | None = None, **how: Any) -> str:
    return "".join(supar_cli.generate(run, prompt, **how))


def test_a_run_of_a_vocabulary_speaks_it(tmp_path: Path) -> None:
    made = by_level()
    made.save(str(tmp_path / "t.json"))
    (tmp_path / "data.jsonl").write_text((json.dumps({"text": "€ hell!"}) + "\n") * 60, "utf-8")
    data = {"tokenizer": str(tmp_path / "t.json")}
    model = {"context": CONTEXT, "vocab": made.get_vocab_size()}
    run = train(tmp_path / "data.jsonl", tmp_path / "run", train={"steps": 40}, model=model, data=data)
    assert text_of(run) == "€ hell!"
    assert list(supar_cli.generate(run, "€")) == ["€", " ", "hell", "!"]
    with pytest.raises(InputError, match=r"prompt: is not UTF-8; expected text"):
        text_of(run, "\udce9")
    with pytest.raises(
        InputError, match=r"prompt: token 258 is outside of the model's vocabulary of 256; expected the"
    ):
        text_of(train(tmp_path / "data.jsonl", tmp_path / "bytes"), "hell", tokenizer=str(tmp_path / "t.json"))


def test_a_run_of_tokens_needs_a_named_tokenizer(plan_of: MakePlan, tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(500, dtype=np.uint16) % 300)
    by_level().save(str(tmp_path / "t.json"))
    plan = plan_of(data={"source": str(tmp_path / "tokens.npy")}, model={"vocab": 300})
    with pytest.raises(
        InputError, match=r"holds tokens, or is not here, .*; expected --tokenizer, bytes or a tokenizer"
    ):
        generate._tokenizer_of(plan, None)
    assert generate._tokenizer_of(plan, "bytes").vocab == 256
    assert generate._tokenizer_of(plan, str(tmp_path / "t.json")).vocab == by_level().get_vocab_size()
    assert generate._tokenizer_of(plan_of(), None).vocab == 256


class TestTokens:
    @pytest.mark.parametrize("prompt", ["d", "x" * CONTEXT, LETTERS[:30]])
    def test_the_likeliest_are_those_without_a_cache(
        self, letters: Path, prompt: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generate, "READ_AT_ONCE", 5)
        notes: list[str] = []
        wanted = bytes(greedy(supar_cli.model(letters), list(prompt.encode()), 40)).decode("utf-8", "replace")
        assert text_of(letters, prompt, tokens=40, note=notes.append) == wanted and len(set(wanted[-40:])) > 9
        assert notes == [f"beyond the context of {CONTEXT} tokens the oldest half of it was forgotten each time"]
        assert text_of(letters, prompt, tokens=40, temperature=1e-9) == wanted
        assert text_of(letters, prompt, tokens=40, temperature=3.0, top_k=1) == wanted
        assert text_of(letters, prompt, tokens=40, temperature=3.0) != wanted

    def test_the_text_ends_where_a_document_does(self, story: Path) -> None:
        notes: list[str] = []
        assert text_of(story, "a", note=notes.append) == STORY
        assert notes == ["the document ended after 10 new tokens"]
        assert text_of(story, tokens=50) == STORY  # from nothing
        assert (
            text_of(story, STORY + "\0a", tokens=3) == STORY + "\0aé" + "\ufffd"
        )  # the prompt may hold ends; cut within €

    def test_a_seed_and_a_position_draw_a_token(self, letters: Path) -> None:
        how: dict[str, Any] = {"temperature": 1.0, "top_k": 40}
        whole = text_of(letters, "def ", tokens=12, seed=3, **how)
        assert whole == text_of(letters, "def ", tokens=12, seed=3, **how)
        assert whole != text_of(letters, "def ", tokens=12, seed=4, **how)
        assert whole.isascii()  # so its tokens are those of the text, and half of it is continued as it was
        assert text_of(letters, whole[:9], tokens=7, seed=3, **how) == whole

    @pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (0.7, 40)])
    def test_draws_by_the_softmax(self, temperature: float, top_k: int | None) -> None:
        """Of numbers that are spread evenly, each token gets its share, to a number at each end of its part."""
        logits_V, count = np.random.default_rng(0).normal(0, 2, 17), 20_000
        drawn = [generate.draw(logits_V, temperature, top_k, (at + 0.5) / count) for at in range(count)]
        chance_V = np.exp(logits_V / temperature)
        chance_V[np.argsort(logits_V)[: -top_k if top_k else 0]] = 0
        shares_V = np.bincount(drawn, minlength=17) / count
        assert np.abs(shares_V - chance_V / chance_V.sum()).max() < 2 / count
        other_V = np.exp(logits_V / temperature * 1.1)  # the control
        assert np.abs(shares_V - other_V / other_V.sum()).max() > 0.005
        assert generate.draw(logits_V, temperature, top_k, 0.0) == logits_V.argmax()
        assert generate.draw(logits_V, temperature, top_k, 1 - 2**-53) < 17

    def test_a_model_that_diverged_is_named(self, letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plan, model = loaded_model.load(letters, "cpu")
        torch.nn.init.constant_(model.final_norm.weight, float("nan"))
        monkeypatch.setattr(loaded_model, "load", lambda *_: (plan, model))
        text = supar_cli.generate(letters, "def")
        assert "".join(next(text) for _ in range(3)) == "def"
        with pytest.raises(UnusableResult, match="letters: the logits after 3 tokens are not finite"):
            next(text)


# ------------------------------------------------------------------------------------------------ the command


class TestCommand:
    def test_prints_the_text_and_says_the_rest_on_stderr(self, supar_here: Supar, story: Path) -> None:
        ended = supar_here("generate", str(story), "a")
        assert (ended.status, ended.out, ended.err) == (0, STORY, "the document ended after 10 new tokens\n")
        (checkpoint,) = (story / "checkpoints").iterdir()
        ended = supar_here("generate", str(checkpoint), "-q", "--tokens", "3")
        assert (ended.status, ended.out, ended.err) == (0, "aé", "")
        drawn = [supar_here("generate", str(story), "a", "--temperature", "5", "--seed", seed).out for seed in "112"]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_finds_the_run(
        self, supar_here: Supar, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(story, tmp_path / "runs/story")
        assert supar_here("generate", "story", "a").out == STORY
        ended = supar_here("generate")
        assert ended.out == STORY and ended.err.startswith("the newest run: runs/story\n")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("aé".encode()[:-1])))
        assert supar_here("generate", "-").out == STORY  # the last character was cut, and is completed

    @pytest.mark.parametrize("word", ["def f(", "x" * 5000, "a\nb", "text.txt"])
    def test_what_is_no_run_is_told_from_a_prompt(self, supar_here: Supar, text_file: Path, word: str) -> None:
        for more in ([], ["prompt"]):
            ended = supar_here("generate", word, *more)
            assert (
                ended.status == 2 and ended.out == "" and "and then the prompt: supar generate runs/NAME " in ended.err
            )
            assert ended.err.startswith(f"error: {word[:60]!r}"[:-1]) and len(ended.err) < 300

    @pytest.mark.parametrize(
        ("arguments", "status", "words"),
        [
            (["", "--tokens", "5"], 2, "prompt: has no token; expected text, or no prompt"),
            (["a", "--tokens", "0", "--temperature", "-1"], 2, "--tokens 0: 0; expected a whole number above 0"),
            (["a", "--temperature", "-1"], 2, "--temperature -1: -1.0; expected 0, for the likeliest tokens, or a"),
            (["a", "--temperature", "nan"], 2, "--temperature nan: nan; expected 0"),
            (["a", "--temperature", "2", "--top-k", "0"], 2, "--top-k 0: 0; expected a whole number above 0"),
            (["a", "--top-k", "4"], 2, "--top-k 4: at temperature 0 nothing is drawn; expected a temperature above 0"),
            (["a", "--device", "tpu"], 2, "--device tpu: 'tpu' is not a valid device"),
            (["a", "--tokenizer", "none.json"], 2, "--tokenizer none.json: none.json: no such file; expected `bytes`"),
            (["-"], 2, "<stdin>: standard input is empty; did the command before the pipe fail?"),
        ],
    )
    def test_refuses(
        self,
        supar_here: Supar,
        story: Path,
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        status: int,
        words: str,
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
        ended = supar_here("generate", str(story), *arguments)
        assert (ended.status, ended.out) == (status, "") and f"error: {words}" in ended.err

    def test_a_dead_reader_ends_it(self, letters: Path) -> None:
        """So many tokens would take minutes."""
        command = f"{sys.executable} -m supar_cli generate {letters} abc --tokens 1000000 | head -c 9"
        done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, timeout=60)
        assert len(done.stdout) == 9 and done.stderr == b""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_likeliest_tokens_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    hf = pytest.importorskip("transformers", reason="transformers runs the exported folder")
    (tmp_path / "text.txt").write_text(LETTERS)
    shape: dict[str, Any] = {"gpt2": {"bias": True}, "llama": {"kv_heads": 1, "tied": False}}[family]
    model = {"family": family, "context": 80, **shape}
    run = train(tmp_path / "text.txt", tmp_path / "run", train={"steps": 30}, model=model)
    supar_cli.export(run, tmp_path / "folder", to=family)
    theirs, prompt = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "folder"), "def f("
    encoder = hf.AutoTokenizer.from_pretrained(tmp_path / "folder")
    index_BT = encoder(prompt, return_tensors="pt").input_ids
    found_BT = theirs.generate(index_BT, do_sample=False, max_new_tokens=64)
    assert encoder.decode(found_BT[0]) == text_of(run, prompt, tokens=64)
    assert found_BT.shape == (1, len(prompt) + 64) and len(set(found_BT[0].tolist())) > 9
    with torch.no_grad():  # the control
        next(theirs.parameters()).mul_(-1)
    assert encoder.decode(theirs.generate(index_BT, do_sample=False, max_new_tokens=64)[0]) != text_of(run, prompt)
