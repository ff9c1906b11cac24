"""Document type of the plan: every number a training run needs, resolved per tensor."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from math import nan, prod
from pathlib import Path
from typing import Any, ClassVar, Literal

from supar_cli.errors import InputError
from supar_cli.planning import layout, plan_sections
from supar_cli.planning.data_section import (
    DIGITS as DIGITS,  # re-exported: `training` and `data` read plans, never specs
)
from supar_cli.planning.data_section import Data as Data
from supar_cli.planning.document import content_hash, read_file
from supar_cli.planning.plan_sections import DecoderBase, Parameterization, PlanSparsity, PlanTask, Values
from supar_cli.planning.plan_sections import OwnModel as OwnModel
from supar_cli.planning.plan_sections import PlanModel as PlanModel
from supar_cli.planning.plan_sections import PlanTensor as PlanTensor
from supar_cli.planning.plan_sections import PlanTrain as PlanTrain
from supar_cli.planning.plan_sections import PlanViT as PlanViT
from supar_cli.planning.problems import parse
from supar_cli.planning.rules import STARTS, Edition
from supar_cli.planning.schema import Field, Section
from supar_cli.planning.spec import Engine, Hyperparameters, Model, Run, require_kind

CURRENT_RULES: Edition = 2  # the edition of the rules that new plans are made by; 1 is that of supar.plan/v1

# keys of a row that follow from the model's own section in supar's families, where `Plan.check` holds them to it
_DERIVED = ("site", "block", "fan_in_axes", "fan_in", "base_fan_in")


class Plan(Section):
    """`supar.plan/v2`: a row of numbers for each tensor, and all else that decides a run."""

    EARLIER: ClassVar[dict[str, Any]] = {"supar.plan/v1": lambda data: _from_v1(data)}
    UNHASHED = ("run", "meta")
    WHOLE_SECTIONS = ("model", "hyperparameters", "parameterization", "sparsity", "train", "data")

    kind: Literal["supar.plan/v2"]
    parents: dict[str, str] = Field(default_factory=dict)
    model: PlanModel | PlanViT | OwnModel
    parameterization: Parameterization
    hyperparameters: Hyperparameters
    sparsity: PlanSparsity
    values: Values = Field(default_factory=Values, neutral=True)
    tensors: list[PlanTensor] = Field(min_length=1)
    task: PlanTask = Field(default_factory=PlanTask, neutral=True)
    data: Data | None
    train: PlanTrain
    run: Run = Field(default_factory=Run)
    meta: dict[str, Any] = Field(default_factory=dict)

    def check(self) -> None:
        sparsity, density = self.sparsity.sparsity, self.sparsity.density
        if abs(sparsity + density - 1) > 1e-9:
            raise ValueError(f"sparsity.density: {density} and sparsity {sparsity} don't add up to 1")
        layout.check_names(self.tensors)
        self._check_updates()
        self._check_values()
        if isinstance(self.model, PlanModel):
            self._check_decoder(self.model)
        known = {key for row in self.tensors if row.role == "hidden" for key in layout.setting_names(row)}
        for name in self.run.engine if isinstance(self.run.engine, dict) else ():
            if name not in known:
                raise ValueError(
                    f"run.engine.{name}: expected a hidden tensor, site (`attn.q`), part (`attn`) or `hidden`"
                )

    def _check_values(self) -> None:
        """Check that the rows' starts are of the plan's file of values, where it has one. Raises ValueError."""
        source = self.values.source
        if source == "file" and isinstance(self.model, OwnModel):
            remedy = "expected random, and `prepare(model, plan, initialise=False)`, which keeps the model's values"
            raise ValueError(f"values.source: file, of a model of your own; {remedy}")
        for at, row in enumerate(self.tensors):
            if (row.init == "file") != (source == "file"):
                raise ValueError(f"tensors.{at}.init: {row.init}; expected it as values.source says, which is {source}")

    def _check_updates(self) -> None:
        """Check that masks which change have a step to do so, and the live weights for their floors. Raises ValueError."""
        updates, steps = self.sparsity.updates, self.train.steps
        if updates is None:
            return
        if updates.step_at(updates.begin, steps) == updates.step_at(updates.end, steps):
            what = f"{updates.end:g} and begin, {updates.begin:g}, are the same of {steps} steps, so no mask changes"
            raise ValueError(f"sparsity.updates.end: {what}; expected a later end or more steps")
        moving = [row for row in self.tensors if row.kept < row.size]
        if not moving:
            raise ValueError("sparsity.updates: no tensor is sparse, so no mask changes; expected null")
        if updates.start is not None and updates.start < (lowest := min(row.density for row in moving)):
            what = f"{updates.start:g} is below the density of each tensor, of which the lowest is {lowest:g}"
            raise ValueError(f"sparsity.updates.start: {what}; expected a higher one")
        for row in moving:
            if updates.min_per_neuron > (most := row.kept * row.fan_in // row.size):
                what = f"{updates.min_per_neuron} for each neuron are more than {row.name} keeps"
                raise ValueError(f"sparsity.updates.min_per_neuron: {what}; expected at most {most}")

    def _check_decoder(self, model: PlanModel) -> None:
        """Check the keys that follow from the model section. Raises ValueError."""
        if self.data is None:
            raise ValueError("data: null; expected the data to train on")
        require_kind(model, self.data)
        if (task := "next_token" if model.data_kind == "tokens" else "classification") != self.task.kind:
            raise ValueError(f"task.kind: {self.task.kind}; expected {task}, which the family {model.family} learns")
        train, tokens = self.train, self.train.steps * self.train.batch_size * model.context
        if (train.tokens is None) == (model.data_kind == "tokens"):
            missing = (
                "is missing" if train.tokens is None else f"{train.tokens}; expected none, as images have no tokens"
            )
            raise ValueError(f"train.tokens: {missing}")
        if train.tokens not in (None, tokens):
            length = f"{train.steps} steps of {train.batch_size} sequences of {model.context} tokens"
            raise ValueError(f"train.tokens: {train.tokens} is not {length}; expected {tokens}")
        base = self.parameterization.base
        for key in ("width", "ffn_width", "layers", "kv_share"):
            if vars(base)[key] is None:
                raise ValueError(f"parameterization.base.{key}: is missing")
        if model.layers > len(self.tensors):
            raise ValueError(f"model.layers: {model.layers} layers need more than the {len(self.tensors)} tensors here")
        derived = plan_sections.derived_keys(model, base)
        for at, row in enumerate(self.tensors):
            for key, value in derived.get(row.name, {}).items():
                given = vars(row)[key]
                if given != value:
                    raise ValueError(f"tensors.{at}.{key}: {given}; the model's shape gives {value} to {row.name}")

    def beside(self, document: str) -> Plan:
        """The plan with the paths of its files resolved from its document's folder; for `-`, from the working directory."""
        if document == "-":
            return self
        files = (self.sparsity.source, self.values)
        paths = [None if one.path is None else str((Path(document).parent / one.path).resolve()) for one in files]
        return self.with_files(*paths)

    def with_files(self, masks: str | None, values: str | None) -> Plan:
        """The plan with its files of masks and values in other places."""
        source = self.sparsity.source.model_copy(update={"path": masks})
        sparsity = self.sparsity.model_copy(update={"source": source})
        return self.model_copy(update={"sparsity": sparsity, "values": self.values.model_copy(update={"path": values})})

    @property
    def text(self) -> Data:
        """The data section of a plan that reads text. Raises InputError for images."""
        data = self.own_data
        if data.kind != "tokens":
            raise InputError(f"data.kind: {data.kind}; this reads text; expected a plan of the family gpt2 or llama")
        return data

    @property
    def own_data(self) -> Data:
        """The data section of a plan of supar's own families. Raises InputError for a user's model, which has none."""
        if self.data is None:
            command = (self.run.command or "python train.py {plan}").replace("{plan}", "plan.yaml")
            what = "supar trains only its own families, gpt2, llama and vit"
            raise InputError(f"model.family: own; {what}; expected your script, with supar_cli.prepare: {command}")
        return self.data

    @property
    def decoder(self) -> PlanModel:
        """The model section of supar's own families. Raises InputError for a user's model, which has no such shape."""
        if isinstance(self.model, PlanModel):
            return self.model
        raise InputError("model.family: own; this needs one of supar's own families, gpt2, llama or vit")

    def engine(self, row: PlanTensor) -> Engine:
        """The engine that the run section names for a hidden tensor, by its name, site or part, or for all."""
        engine = self.run.engine
        if not isinstance(engine, dict):
            return engine
        return next((engine[key] for key in layout.setting_names(row) if key in engine), "auto")

    def hash(self) -> str:
        """Identity of the experiment: everything but `run`, `meta` and the place of the data, which have a hash of their own."""
        return content_hash(self.experiment())

    def experiment(self) -> dict[str, Any]:
        """What decides the run's result, as plain data.

        Of supar's own families in the form of supar.plan/v1, extended by what that could not say: so the same
        experiment keeps the hash that it had there.
        """
        found = self.identity()
        found["parameterization"].pop("edition", None)  # every number is in the plan, so its derivation does not matter
        if self.data is not None and self.data.hash is not None:
            del found["data"]["source"]
            for one in found["data"].get("sources", ()):
                del one["source"]
        if isinstance(self.model, PlanModel):
            found["kind"] = "supar.plan/v1"
            for row in found["tensors"]:
                for key in _DERIVED:
                    row.pop(key, None)
                if row.get("init_constant", nan) == STARTS.get(row["role"]):
                    del row["init_constant"]
                    row["init_std"] = 0.0
        return found

    @property
    def name(self) -> str:
        """Name of the run directory this plan gets by default."""
        shape = f"{self.model.label}-s{self.sparsity.sparsity:g}"
        return f"{self.parameterization.name}-{shape}-{self.hash()[7:15]}"

    @property
    def parameters(self) -> int:
        return sum(row.size for row in self.tensors if row.tied_to is None)

    @property
    def live(self) -> int:
        return sum(row.kept for row in self.tensors if row.tied_to is None)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward FLOPs as computed, zeros included: 6 a weight in a product, and those of attention."""
        products = sum(row.size for row in self.tensors if row.fan_in_axes) + self.model.tied_head_size
        return 6.0 * products + self.model.attention_flops_per_token

    @property
    def flops_per_row(self) -> float:
        """Those of a sequence, or of an image, whose classes are computed at one position."""
        model = self.decoder
        products = sum(row.size * model.positions_of(row.role) for row in self.tensors if row.fan_in_axes)
        return 6.0 * (products + model.tied_head_size * model.context) + model.attention_flops_per_token * model.context


def base_model(plan: Plan) -> Model:
    """A one-layer model with the proxy's shapes and as many heads as its share of key/value heads requires."""
    base = decoder_base(plan)
    kv_share = Fraction(base.kv_share).limit_denominator(base.width)
    shape = {"width": base.width, "ffn_width": base.ffn_width, "layers": 1}
    heads = {"heads": kv_share.denominator, "kv_heads": max(1, kv_share.numerator)}
    heads["head_width"] = (base.attention_width or base.width) // heads["heads"]
    return plan.decoder.model_copy(update=shape | heads)


def decoder_base(plan: Plan) -> DecoderBase:
    """The shape of a plan's proxy. Raises InputError for a user's model, which has no such shape."""
    _ = plan.decoder
    return DecoderBase.model_validate(plan.parameterization.base.model_dump())


def _from_v1(data: dict[str, Any]) -> dict[str, Any]:
    """A plan of supar.plan/v1 in today's form: the same run, by the first edition of the rules.

    Errors are kept, so that the later validation reports them.
    """
    found = {**data, "kind": "supar.plan/v2"}
    model, parameterization, tensors = data.get("model"), data.get("parameterization"), data.get("tensors")
    if isinstance(parameterization, dict):
        found["parameterization"] = {**parameterization, "edition": 1}
    if isinstance(tensors, list):
        derived: dict[str, dict[str, Any]] = {}
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            shape = Model.model_validate({key: value for key, value in model.items() if key != "multipliers"})  # type: ignore[union-attr]
            if shape.layers <= len(tensors):
                base = plan_sections.Base.model_validate(parameterization["base"])  # type: ignore[index]
                derived = plan_sections.derived_keys(shape, base)
        found["tensors"] = [_row_from_v1(row, derived) if isinstance(row, dict) else row for row in tensors]
    return found


def _row_from_v1(row: dict[str, Any], derived: dict[str, dict[str, Any]]) -> dict[str, Any]:
    shape, name, role = row.get("shape"), row.get("name"), str(row.get("role"))
    extents = shape if isinstance(shape, list) and shape and all(type(extent) is int for extent in shape) else [1]
    # a row that the model has no tensor for is refused by name when it is trained
    axes = [len(extents) - 1] if role in ("hidden", "unembedding") else []
    own = derived.get(str(name), {"site": name, "block": None, "fan_in_axes": axes, "base_fan_in": 1})
    fan_in = prod(extents[axis] for axis in own["fan_in_axes"] if axis < len(extents))
    found = {**own, "fan_in": max(fan_in, 1), **row}
    if row.get("init_std") == 0 and role in STARTS:  # what v1 says of every tensor with a constant initial value
        del found["init_std"]
        found["init_constant"] = STARTS[role]
    return found


def read_plan(path: Path) -> Plan:
    """The plan in a file, of today's kind or of an earlier one. Raises InputError with every problem in it."""
    return parse(Plan, read_file(str(path))[0]).beside(str(path))


def with_steps(plan: Plan, steps: int) -> Plan:
    """The plan for another number of steps, its warm-up and its decay the same shares of them."""
    warmup = round(plan.train.warmup_steps * steps / plan.train.steps)
    decay = plan.train.decay_steps
    decay = None if decay is None else min(round(decay * steps / plan.train.steps), steps - warmup)
    tokens = None if plan.train.tokens is None else plan.train.tokens // plan.train.steps * steps
    length = {"steps": steps, "warmup_steps": warmup, "decay_steps": decay, "tokens": tokens}
    train = plan.train.model_copy(update=length)
    return plan.model_copy(update={"train": train})
