"""Trainer, accelerate and Lightning around a prepared model, bit for bit; the manual's page on own models, run as written."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import supar_cli as supar
from supar_cli import files
from supar_cli.cli.help import PAGES
from supar_cli.errors import InputError, SuparError
from supar_cli.planning import document, templates
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy

from .own_loop import LR, VOCAB, Training, batch, plan_of, row
from .test_readme import blocks, run

transformers = pytest.importorskip("transformers")
LENGTH, STEPS = 8, 6


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, tie_word_embeddings=False, **sizes)
    return transformers.LlamaForCausalLM(config)


ROLES = {"embed_tokens": "embedding", "lm_head": "unembedding"}


def llama_plan(fold: float = 0.25, **changes: Any) -> Plan:
    tensors = []
    for name, parameter in llama().named_parameters():
        module = name.split(".")[-2]
        role = ROLES.get(module, "norm" if "norm" in module else "hidden")
        shape, times = list(parameter.shape), fold if role == "unembedding" else 0.5 if role == "hidden" else 1.0
        sparse = {"density": 0.25, "kept": parameter.numel() // 4} if role == "hidden" else {}
        folded = {"fold": fold, "eps": 1e-8 / fold} if role == "unembedding" and fold != 1 else {}
        tensors.append(row(name, role, shape, times, **sparse, **folded))
    return plan_of(tensors, **changes)


class Windows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def arguments(folder: Path, **changes: Any) -> Any:
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_steps": 3,
        "logging_steps": 1,
        "warmup_steps": 2,
    }
    given |= {"max_grad_norm": 0, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1}
    return transformers.TrainingArguments(output_dir=str(folder), **(given | changes))


def trainer(folder: Path, plan: Plan | None = None, **changes: Any) -> Any:
    prepared = supar.prepare(llama(), plan or llama_plan())
    return transformers.Trainer(
        model=prepared.model,
        args=arguments(folder, **changes),
        train_dataset=Windows(),
        optimizers=(prepared.optimizer(clip=1.0), None),
        callbacks=[supar.Callback(prepared)],
    )


class Planned(supar.TrainerMixin, transformers.Trainer):  # type: ignore[misc,name-defined]
    """As a user under FSDP2 has it."""


def losses(done: Any) -> list[float]:
    return [record["loss"] for record in done.state.log_history if "loss" in record]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that was not interrupted, with its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    done = trainer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        done.train()
    return folder, done


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


class TestTrainer:
    def test_trains_as_planned(self, whole: tuple[Path, Any]) -> None:
        folder, done = whole
        (callback,) = (one for one in done.callback_handler.callbacks if isinstance(one, supar.Callback))
        prepared = callback.prepared
        assert prepared.check() == {}
        peaks = [group["initial_lr"] / group["ratio"] for group in done.optimizer.param_groups]
        assert peaks == pytest.approx([LR] * len(peaks)) and len(losses(done)) == STEPS
        assert supar.load(str(folder / "checkpoint-3" / "plan.yaml")).hash() == prepared.plan.hash()

    def test_resumes_bit_for_bit(self, whole: tuple[Path, Any], tmp_path: Path) -> None:
        folder, done = whole
        again = trainer(tmp_path)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        assert losses(again)[-3:] == losses(done)[-3:] and same_tensors(again.model, done.model)

    def test_a_checkpoint_of_another_seed_is_refused(self, whole: tuple[Path, Any], tmp_path: Path) -> None:
        train = {**plan_of().train.model_dump(), "seed": 7}
        other = trainer(tmp_path, llama_plan(train=train))
        with pytest.raises(SuparError, match=r"q_proj\.weight"):
            other.train(resume_from_checkpoint=str(whole[0] / "checkpoint-3"))
        assert losses(other) == []

    def test_a_checkpoint_of_another_plan_is_refused(self, whole: tuple[Path, Any]) -> None:
        folder = whole[0]
        other = trainer(folder, llama_plan(fold=0.5))
        with pytest.raises(InputError, match=r"plan\.yaml: tensors: differs from the plan in use"):
            other.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        assert [record for record in other.state.log_history if record["step"] > 3] == []

    def test_another_optimizer_is_refused(self, tmp_path: Path) -> None:
        prepared = supar.prepare(llama(), llama_plan())
        own = transformers.Trainer(
            model=prepared.model,
            args=arguments(tmp_path),
            train_dataset=Windows(),
            callbacks=[supar.Callback(prepared)],
        )
        with pytest.raises(InputError, match=r"optimizers=\(prepared\.optimizer\("):
            own.train()
        assert own.state.global_step == 0

    def test_its_own_clipping_is_refused_where_something_is_folded(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"max_grad_norm=0 and prepared\.optimizer\(clip=1\.0\)"):
            trainer(tmp_path, max_grad_norm=1.0).train()
        trainer(tmp_path, llama_plan(fold=1.0), max_grad_norm=1.0, max_steps=1).train()

    def test_arguments_without_effect_are_named(self, tmp_path: Path) -> None:
        given = {"learning_rate": 3e-4, "weight_decay": 0.2, "adam_beta2": 0.98, "optim": "sgd"}
        with pytest.warns(UserWarning) as told:
            trainer(tmp_path, max_steps=1, **given).train()
        said = [str(one.message) for one in told if "has no effect" in str(one.message)]
        assert {text.split("=")[0].removeprefix("supar: ") for text in said} == set(given)

    @pytest.mark.parametrize("source", ["model", "model_init"])
    def test_another_model_is_refused(self, source: str, tmp_path: Path) -> None:
        """Without masks nothing else would show it."""
        dense = [{**row.model_dump(), "density": 1.0, "kept": row.size} for row in llama_plan().tensors]
        prepared = supar.prepare(llama(), plan_of(dense))
        other = {"model": llama()} if source == "model" else {"model_init": llama}
        made = Planned(**other, args=arguments(tmp_path), train_dataset=Windows(), prepared=prepared)
        with pytest.raises(InputError, match=r"expected model=prepared\.model, and no model_init"):
            made.train()

    def test_the_mixin_makes_the_same_run(self, whole: tuple[Path, Any], tmp_path: Path) -> None:
        prepared = supar.prepare(llama(), llama_plan())
        made = Planned(
            model=prepared.model, args=arguments(tmp_path), train_dataset=Windows(), prepared=prepared, clip=1.0
        )
        made.train()
        assert losses(made) == losses(whole[1]) and same_tensors(made.model, whole[1].model)

    def test_goes_on_from_a_saved_model_bit_for_bit(self, tmp_path: Path) -> None:
        """save_pretrained, from_pretrained, prepare(initialise=False)."""

        def steps(model: nn.Module, optimizer: Any, seeds: range) -> list[float]:
            found = []
            for seed in seeds:
                loss = model(input_ids=batch(seed), labels=batch(seed)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            return found

        prepared = supar.prepare(llama(), llama_plan())
        optimizer = prepared.optimizer()
        steps(prepared.model, optimizer, range(3))
        prepared.model.save_pretrained(tmp_path)  # type: ignore[operator]
        prepared.save(tmp_path)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        expected = steps(prepared.model, optimizer, range(3, 6))

        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).train()
        again = supar.prepare(loaded, supar.load(str(tmp_path / "plan.yaml")), initialise=False)
        again.verify(tmp_path)
        optimizer = again.optimizer()
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        assert steps(loaded, optimizer, range(3, 6)) == expected


class TestAccelerate:
    def test_trains_as_a_plain_loop(self) -> None:
        from accelerate import Accelerator

        plain, run = Training(), Training()
        accelerator = Accelerator(cpu=True)
        run.model, run.optimizer = accelerator.prepare(run.model, run.optimizer)
        assert [run.step() for _ in range(3)] == [plain.step() for _ in range(3)]
        assert run.prepared.check() == {}

    def test_its_clipping_is_torchs_and_told(self) -> None:
        from accelerate import Accelerator

        run, accelerator = Training(), Accelerator(cpu=True)
        run.model, run.optimizer = accelerator.prepare(run.model, run.optimizer)
        accelerator.backward(run.loss())
        accelerator.clip_grad_norm_(run.model.parameters(), 0.1)
        with pytest.warns(UserWarning, match=r"prepared\.clip_grad_norm_\(") as told:
            run.optimizer.step()
        assert [one.filename for one in told if "clip" in str(one.message)] == [__file__]


class TestLightning:
    def fit(self, lightning: Any, folder: Path, run: Training, clip: float | None = None, **options: Any) -> None:
        class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.model = run.model

            def training_step(self, ids: Any, index: int) -> torch.Tensor:
                loss = run.loss()
                run.steps += 1
                return loss

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return run.prepared.optimizer(clip=clip)

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "default_root_dir": folder, "accelerator": "cpu"}
        made = lightning.Trainer(max_steps=3, **quiet, **options)
        made.fit(Module(), torch.utils.data.DataLoader(list(range(8)), batch_size=1))

    def test_trains_as_a_plain_loop(self, lightning: Any, tmp_path: Path) -> None:
        plain, run = Training(clip=0.1), Training()
        self.fit(lightning, tmp_path, run, clip=0.1)
        for _ in range(3):
            plain.step()
        assert run.steps == 3 and same_tensors(run.model, plain.model)
        assert run.prepared.check() == {}

    def test_its_clipping_is_told(self, lightning: Any, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match=r"prepared\.clip_grad_norm_\("):
            self.fit(lightning, tmp_path, Training(), gradient_clip_val=0.1)


PAGE = PAGES / "own-models.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder after the page's commands."""
    path = tmp_path_factory.mktemp("own")
    (path / "bin").mkdir()
    for name, arguments in (("supar", "-m supar_cli "), ("python", "")):
        program = path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        program.chmod(0o755)
    spec = templates.text("own").replace("trials: 24", "trials: 1").replace("steps: 1000", "steps: 4")
    spec = spec.replace("finalists: 3", "finalists: 1").replace("  seeds: 3 ", "  lr_fit_octaves: []\n  seeds: 1 ")
    (path / "supar.yaml").write_text(spec)
    for language, block in blocks(PAGE):
        if language == "sh":
            run(path, language, block)
    return path


@pytest.fixture
def reader(folder: Path, monkeypatch: pytest.MonkeyPatch, lightning: Any) -> dict[str, Any]:
    """What a reader's session in the folder holds."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "gpt", raising=False)
    return {"__name__": "reader"}


def test_commands_make_a_plan_and_a_proxy(folder: Path) -> None:
    proxy, plan = supar.load(str(folder / "proxy.yaml")), supar.load(str(folder / "plan.yaml"))
    assert plan.model.target == {"width": 128} and plan.hyperparameters.lr == proxy.hyperparameters.lr
    assert {row.density for row in plan.tensors if row.role == "hidden"} == {0.1}


def test_the_layout_is_shown_as_it_is_written(folder: Path) -> None:
    (shown,) = (yaml.safe_load(block) for language, block in blocks(PAGE) if language == "yaml")
    written = yaml.safe_load((folder / "layout.yaml").read_text())
    named = {row["name"]: row for row in written["tensors"]}
    for one in shown["tensors"]:
        own, found = one.pop("own"), named[one["name"]].pop("own")
        assert (own["mean"], own["std"]) == pytest.approx((found["mean"], found["std"]), abs=2e-3)
        assert one == named[one["name"]]
    assert len(shown["tensors"]) >= 4


def test_python_blocks_run_in_one_session(folder: Path, reader: dict[str, Any]) -> None:
    found = [block for language, block in blocks(PAGE) if language == "python"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for block in found:
            exec(compile(block, "own-models.md", "exec"), reader)
    told = [str(one.message) for one in caught if one.filename == "own-models.md" or "supar_cli" in one.filename]
    assert [text for text in told if not text.startswith("RMSprop: its numbers are not the plan's")] == []
    assert len(found) >= 9 and (folder / "saved" / "plan.yaml").exists()
    with pytest.raises(NameError):
        exec(found[-1].replace("prepared.", "unprepared."), reader)


def test_llama_trains_and_reports(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `supar tune-proxy` runs it: a plan in a file, losses in another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUPAR_RESULT", str(tmp_path / "losses.jsonl"))
    script: dict[str, Any] = {"__name__": "llama"}
    exec(compile(templates.text("llama.py"), "llama.py", "exec"), script)
    sizes = {name: {"width": width} for name, width in (("base", 32), ("wider", 64), ("third", 96))}
    layout = supar.layout(script["make"], example=script["example"], **sizes)
    Path("layout.yaml").write_text(supar_document(layout))
    proxy = supar.load(str(folder / "proxy.yaml")).model_dump()
    proxy["model"] = {"family": "own", "layout": "layout.yaml"}
    plan = supar.transfer(validate(Proxy, proxy, "proxy"), width=64, density="1/4", steps=4)
    Path("plan.yaml").write_text(supar_document(plan))
    script["main"]("plan.yaml")
    reported = [json.loads(line) for line in Path("losses.jsonl").read_text().splitlines()]
    assert reported[-1]["step"] == 4 and 0 < reported[-1]["loss"] < 7
    assert supar.load("trained/plan.yaml").hash() == plan.hash() and Path("trained/model.safetensors").exists()


def supar_document(one: Any) -> str:
    return document.write([one.model_dump()])


def test_scripts_are_in_the_wheel() -> None:
    assert templates.scripts() == ["gpt.py", "llama.py", "mlp.py", "ppo.py", "resnet.py"]
    assert all(files.template(f"own/{name}").exists() for name in templates.scripts())
