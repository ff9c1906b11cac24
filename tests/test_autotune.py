"""How an engine is chosen: by name, or by a measurement that is made once, and of a large layer's first rows."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan
from supar_cli.sparse import autotune
from supar_cli.sparse.autotune import EngineChoice, LayerCase
from supar_cli.sparse.csr import Sparse
from supar_cli.sparse.masks import Mask
from supar_cli.training.reporter import NullReporter
from supar_cli.training.trainer import Trainer
from tests.conftest import Called, environment
from tests.test_engines import drawn

MakePlan = Callable[..., Plan]


class TestChoice:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache/supar/engines.json"

    CASE = LayerCase(torch.device("cpu"), torch.float32, 4096)

    def test_it_is_measured_once_and_kept(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mask = drawn((256, 256), 1 / 64)
        first = autotune.fastest(mask, self.CASE)
        assert first.measured_now and set(first.seconds) == {"dense", "sparse"} and all(first.seconds.values())
        monkeypatch.setattr(autotune, "times", lambda *_: pytest.fail("measured again"))
        again = autotune.fastest(drawn((256, 256), 1 / 64), self.CASE)
        assert (again.name, again.seconds, again.measured_now) == (first.name, first.seconds, False)
        assert list(json.loads(cache.read_text()).values()) == [first.seconds]

    @pytest.mark.parametrize(("sparse", "name"), [(0.5, "sparse"), (0.95, "dense"), (2.0, "dense")])
    def test_the_fastest_wins_if_by_enough(self, monkeypatch: pytest.MonkeyPatch, sparse: float, name: str) -> None:
        monkeypatch.setattr(autotune, "times", lambda *_: {"dense": 1.0, "sparse": sparse})
        assert autotune.fastest(drawn((256, 256), 0.1), self.CASE).name == name

    def test_at_one_weight_in_128_the_sparse_one_is_faster_and_at_one_in_two_the_dense_one(self) -> None:
        """A real measurement: 10 times and more either way on an idle machine."""
        assert autotune.fastest(drawn((1024, 512), 1 / 128), self.CASE).name == "sparse"
        assert autotune.fastest(drawn((1024, 512), 1 / 2), self.CASE).name == "dense"

    @pytest.mark.parametrize(
        ("dense", "limit_s", "rounds", "tokens"),
        [(3.0, 99.0, 4, {64}), (1.5, 99.0, 10, {64, 256}), (1.5, 45.0, 8, {64, 256}), (1.5, 4.0, 3, {64})],
    )  # milliseconds a token by the dense engine, one by the sparse one
    def test_what_loses_on_a_few_tokens_is_measured_no_further_and_time_is_limited(
        self, monkeypatch: pytest.MonkeyPatch, dense: float, limit_s: float, rounds: int, tokens: set[int]
    ) -> None:
        calls: list[tuple[str, int]] = []
        clock = 0.0

        def timed(run: Any, _: Any) -> float:
            nonlocal clock
            engine, _, x, _ = run.args
            calls.append((type(engine).__name__, len(x)))
            spent = len(x) * (dense if calls[-1][0] == "Dense" else 1.0) / 64
            clock += spent
            return spent

        monkeypatch.setattr(autotune, "timed", timed)
        monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock)
        choice = autotune.fastest(drawn((256, 256), 1 / 64), self.CASE, limit_s)
        assert choice.name == "sparse" and choice.seconds["dense"] == dense * choice.seconds["sparse"]
        assert [sum(name == one for one, _ in calls) for name in ("Dense", "Sparse")] == [rounds, rounds]
        assert {tokens for _, tokens in calls} == tokens and clock <= limit_s + 10  # the last round ends

    def test_compiling_takes_nothing_of_the_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a machine's first measurement: it would be made of a single round, and kept."""
        clock, calls = 0.0, 0

        def timed(run: Any, _: Any) -> float:
            nonlocal clock, calls
            calls += 1
            clock += 30.0 if calls <= 2 else 0.01
            return 0.01

        monkeypatch.setattr(autotune, "timed", timed)
        monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock)
        autotune.fastest(drawn((256, 256), 1 / 64), self.CASE, 5.0)
        assert calls == 2 * (1 + autotune.FIRST_ROUNDS + 1 + autotune.ROUNDS)

    def test_what_cannot_win_is_not_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(autotune, "times", lambda *_: pytest.fail("measured"))
        assert autotune.fastest(drawn((512, 512), 1 / 300), self.CASE) == EngineChoice("sparse", {})
        assert autotune.fastest(drawn((512, 512), 0.6), self.CASE) == EngineChoice("dense", {})
        on_cuda = LayerCase(torch.device("cuda"), torch.float32, 4096, block=16)  # which has no sparse engine
        for density in (1 / 300, 0.6):
            assert autotune.can_win(drawn((512, 512), density), on_cuda) == ["dense", "block"]

    def test_of_a_large_layer_the_first_rows_are_measured_and_it_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By every engine alike, and kept apart from a measurement of all rows."""
        monkeypatch.setattr(autotune, "MOST_POSITIONS", 100 * 256 + 7)
        measured: list[tuple[set[Mask], Mask]] = []

        def times(engines: Any, mask: Mask, *_: Any) -> dict[str, float]:
            measured.append(({engine.mask for engine in engines.values()}, mask))
            return {name: 1.0 if name == "dense" else 0.5 for name in engines}

        monkeypatch.setattr(autotune, "times", times)
        mask = drawn((256, 256), 0.1)
        choice = autotune.fastest(mask, self.CASE)
        first = Mask.of(mask.alive(slice(100)))
        assert measured == [({first}, first)] and choice.rows == 100
        assert choice.text() == "sparse (dense 1e+03 ms, sparse 500 ms for 100 of its rows, measured now)"
        assert autotune.fastest(mask, self.CASE).text().endswith("for 100 of its rows, as measured before)")
        monkeypatch.setattr(autotune, "MOST_POSITIONS", 2**24)
        assert autotune.fastest(mask, self.CASE).rows is None and measured[1:] == [({mask}, mask)]

    def test_measured_rows_are_whole_blocks(self) -> None:
        assert autotune.rows_measured((8192, 8192), None) == 2048
        assert autotune.rows_measured((4096, 4096), None) == 4096
        assert autotune.rows_measured((32768, 8192), 128) == 2048
        assert autotune.rows_measured((128, 3 * 2**18), 16) == 16
        assert autotune.rows_measured((64, 2**21), 16) == 16
        assert autotune.rows_measured((4, 2**25), None) == 1

    def test_a_small_layer_is_dense_unmeasured(self, cache: Path) -> None:
        assert autotune.fastest(drawn((64, 64), 0.1), self.CASE) == EngineChoice("dense", {})
        assert not cache.exists()

    @pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 1}'])
    def test_a_broken_cache_is_measured_anew(self, cache: Path, text: str) -> None:
        cache.parent.mkdir(parents=True)
        cache.write_text(text)
        assert autotune.fastest(drawn((256, 256), 0.1), self.CASE).measured_now
        json.loads(cache.read_text())

    @pytest.mark.parametrize("kept", ["fast", {"dense": "x", "sparse": 1.0}, {"dense": 1.0, "sparse": float("nan")}])
    def test_a_broken_measurement_too(self, cache: Path, kept: Any) -> None:
        assert autotune.fastest(drawn((256, 256), 0.1), self.CASE).measured_now
        cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), kept)))
        assert autotune.fastest(drawn((256, 256), 0.1), self.CASE).measured_now

    def test_without_numba_torch_does_it_and_the_extra_is_named(
        self, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: (name != "numba" and found(name, *rest)) or None
        )
        monkeypatch.setattr(autotune, "MIN_MULTIPLY_ADDS", 1)
        monkeypatch.setattr(autotune, "times", lambda *_: {"dense": 1.0, "sparse": 0.5})
        lines: list[str] = []
        reporter = NullReporter()
        monkeypatch.setattr(reporter, "log", lines.append)
        trainer = Trainer(plan_of(target={"width": 64, "sparsity": {"density": 0.1}}), reporter=reporter)
        engine = trainer.sparse_model.linear("blocks.0.mlp.up").engine
        assert isinstance(engine, Sparse) and engine.kernels == "torch"
        assert "`pip install numba`" in lines[-1]
        trainer.step()

    def test_masks_of_random_counts_share_a_measurement(
        self, plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(autotune, "MIN_MULTIPLY_ADDS", 1)
        monkeypatch.setattr(autotune, "times", lambda *_: {"dense": 1.0, "sparse": 0.5})
        lines: list[str] = []
        reporter = NullReporter()
        monkeypatch.setattr(reporter, "log", lines.append)
        sparsity = {"pattern": "bernoulli", "density": 0.25}
        trainer = Trainer(plan_of(model={"layers": 4}, target={"width": 128, "sparsity": sparsity}), reporter=reporter)
        masks = trainer.sparse_model.masks.values()
        assert len({(mask.shape, mask.count) for mask in masks}) > 12
        measured = [line for line in lines if line.startswith("engine of")]
        assert [line.split(":")[0].split(" at ")[0] for line in measured] == [
            "engine of 16 tensors 128×128",
            "engine of 4 tensors 512×128",
            "engine of 4 tensors 128×512",
        ]

    def test_a_cache_that_cannot_be_written_costs_a_measurement(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        assert autotune.fastest(drawn((256, 256), 0.1), self.CASE).measured_now

    def test_the_most_specific_name_decides(self, plan_of: MakePlan) -> None:
        named = {"hidden": "sparse", "mlp": "dense", "mlp.up": "sparse", "attn.q": "dense", "blocks.0.attn.q": "sparse"}
        trainer = Trainer(plan_of(run={"engine": named}))
        found = {name: choice.name for name, choice in trainer.engines.choices.items()}
        assert found.pop("blocks.0.attn.q") == "sparse" and len(found) > 6
        for name, engine in found.items():
            assert (engine == "dense") == name.endswith((".attn.q", ".mlp.down"))
        trainer = Trainer(plan_of(run={"engine": {"blocks.0.attn.k": "sparse"}}))
        assert trainer.engines.choices["blocks.0.attn.k"].name == "sparse"
        assert trainer.engines.choices["blocks.0.attn.q"].name == "dense"  # of auto, which is, so small

    def test_what_cannot_be_is_refused(self, plan_of: MakePlan) -> None:
        with pytest.raises(InputError, match=r"run\.engine: block needs a plan whose sparsity\.pattern is block"):
            Trainer(plan_of(run={"engine": "block"}))
        with pytest.raises(InputError, match=r"run\.engine: sparse runs on CPU only"):
            autotune.make("sparse", drawn((4, 4), 0.5), LayerCase(torch.device("cuda"), torch.float32, 1))


class Clock:
    """A host that launches kernels, microseconds each, and a device that runs them in order."""

    def __init__(self, fill_us: float) -> None:
        self.host = self.device = 0.0
        self.fill_us, clock = fill_us, self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any) -> None:
                self.at = max(clock.device, clock.host)

            def query(self) -> bool:
                return self.at <= clock.host

            def synchronize(self) -> None:
                clock.host = max(clock.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) / 1000  # type: ignore[no-any-return]

        self.Event = Event

    def launch(self, count: int, kernel_us: float) -> None:
        for _ in range(count):
            self.host += 10
            self.device = max(self.device, self.host) + kernel_us

    def zero_(self) -> None:
        self.launch(1, self.fill_us)

    def wait(self, _: Any) -> None:
        self.host = max(self.host, self.device)


@pytest.mark.parametrize("fill_us", [90.0, 25.0])  # the latter are doubled twice until they keep the device busy
def test_on_cuda_what_the_device_does_decides_and_not_its_launches(
    fill_us: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run's own tokens. The block engine has ten times as many launches, and a sixth of the work."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clock, tokens, empty = Clock(fill_us), list[int](), torch.empty
    work = {"dense": (3, 60.0), "block": (30, 1.0)}
    monkeypatch.setattr(torch, "empty", lambda *_, device=None, **__: clock if device else empty(*_, **__))
    fakes = {"Event": clock.Event, "synchronize": clock.wait, "current_stream": lambda _: None}
    for name, fake in {**fakes, "get_device_name": lambda _: "NVIDIA H100"}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: clock.host / 1e6)
    monkeypatch.setattr(autotune, "make", lambda name, *_: name)
    monkeypatch.setattr(autotune, "draw_values", lambda *_: None)
    monkeypatch.setattr(autotune, "draw_inputs", lambda _, case, __: (tokens.append(case.tokens), None))
    monkeypatch.setattr(autotune, "layer_step", lambda engine, *_: clock.launch(*work[engine]))
    mask, case = drawn((256, 256), 1 / 4), LayerCase(torch.device("cuda", 0), torch.bfloat16, 20_000, block=16)
    choice = autotune.fastest(mask, case)
    assert choice.name == "block" and set(tokens) == {20_000}
    assert choice.seconds == {"dense": pytest.approx(180e-6), "block": pytest.approx(30e-6)}
    (key,) = json.loads((tmp_path / "supar/engines.json").read_text())
    assert key.endswith("20000 tokens, bfloat16, time of the kernels")
    monkeypatch.setattr(autotune, "device_seconds", autotune.timed)  # as before: launches, and other keys
    monkeypatch.setattr(autotune, "_key", lambda *_: "host time")
    assert autotune.fastest(mask, case).name == "dense"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch can use")
def test_the_time_of_kernels_grows_with_them_and_holds_nothing_of_the_host() -> None:
    device, slept_s = torch.device("cuda"), 1e-3
    factor = torch.randn(1024, 1024, device=device)

    def multiply(times: int, slept: float = 0.0) -> None:
        for _ in range(times):
            torch.mm(factor, factor)
        time.sleep(slept)
        torch.mm(factor, factor)

    def median(call: Callable[[], None], timer: Callable[..., float] = autotune.device_seconds) -> float:
        return statistics.median(timer(call, device) for _ in range(9))

    multiply(3)  # loads the library
    one, two = (median(partial(multiply, times)) for times in (9, 19))
    assert 1.6 < two / one < 2.4
    slow = partial(multiply, 9, slept_s)
    assert median(slow) < one + slept_s / 2 < slept_s < median(slow, autotune.timed)  # the control: the host's time


def test_a_devices_inputs_repeat_a_few_drawn_ones() -> None:
    case = LayerCase(torch.device("meta"), torch.bfloat16, 2500)
    x, gradient = autotune.draw_inputs((6, 4), case, torch.bfloat16)
    assert (x.shape, gradient.shape) == ((2500, 4), (2500, 6)) and x.is_leaf and x.requires_grad


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            "fast",
            "-s run.engine=fast: should be 'auto', 'dense', 'sparse', 'block' or a mapping of names to these, not 'fast'",
        ),
        ("{hiden: dense}", "run.engine.hiden: expected a hidden tensor, site (`attn.q`), part (`attn`) or `hidden`"),
        ("{embedding: dense}", "run.engine.embedding: expected a hidden tensor"),
    ],
)
def test_a_wrong_engine_ends_with_2(
    supar_here: Callable[..., Called], plan_of: MakePlan, tmp_path: Path, engine: str, message: str
) -> None:
    from supar_cli.planning import document

    (tmp_path / "plan.yaml").write_text(document.write([plan_of().model_dump()]))
    ended = supar_here("train", "plan.yaml", "-s", f"run.engine={engine}")
    assert ended.status == 2 and message in ended.err and not (tmp_path / "runs").exists()


def test_large_blocks_are_kept_unless_switched_off() -> None:
    code = "from supar_cli.sparse.autotune import keep_large_blocks; print(keep_large_blocks())"
    for value, kept in (("1", str(sys.platform == "linux")), ("0", "False")):
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, env=environment(SUPAR_KEEP_MEMORY=value), check=True)
        assert done.stdout.strip() == kept
