"""A run's model scored on text: its loss, perplexity and bits per byte, each with a standard error.

The scheme is the rolling log-likelihood of EleutherAI's lm-evaluation-harness, so that figures compare: each document by
itself, its first token predicted from the one that separates documents, in windows of the model's context. No token is
predicted twice, and a document's last window reaches back for as much context as the model has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from supar_cli.data import corpus, passages
from supar_cli.data.corpus import Corpus
from supar_cli.data.passages import Passage, Passages
from supar_cli.errors import InputError, SetupError, UnusableResult
from supar_cli.exporting import evaluate_images, loaded_model
from supar_cli.exporting.tokenizer_files import names_tokenizer
from supar_cli.files import Record, file_hash
from supar_cli.models.transformer import Transformer
from supar_cli.models.vit import VisionTransformer
from supar_cli.planning.plan import Data, Plan
from supar_cli.planning.spec import Run
from supar_cli.training import checkpoint_reader
from supar_cli.training.reporter import NullReporter, Reporter
from supar_cli.training.runtime import Runtime, device_name, versions

KIND = "supar.evaluation/v1"
FEWEST_DOCUMENTS = 30  # chosen: fewer may by chance differ less than windows do
TOKENS_AT_ONCE = 2**14  # chosen: what keeps a device busy, and little memory
LOGITS_AT_ONCE = 2**24  # chosen: 64 MiB
BATCHES_SORTED = 16  # chosen: windows of so many batches are sorted by length, so that little of a batch is padding
NOT_SCORED = -100
LARGEST_LOSS = 700.0  # nats; beyond it a perplexity is no double


# the number of a document, some of its tokens in a row, and how many of them, the last ones, are predicted
Window = tuple[int, NDArray[np.int64], int]


def evaluate(
    path: str | Path,
    data: str | Path | None = None,
    *,
    tokens: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    reporter: Reporter | None = None,
    **reading: Any,
) -> Record:
    """Score the model of a run, or of one of its checkpoints, on a corpus or images, or on what the run holds out of its own.

    Of a folder that is its validation split if it names one, else its test split, else all. `tokens` scores only the first
    ones. `reading` says how data are read, as a plan's data section: format, tokenizer, field, dtype, encoding, separator,
    or size, image, label. The record has loss (nats per token), perplexity and bits per byte, or loss (nats per image),
    accuracy and that of each class, with standard errors NAME_se. Raises InputError, SetupError, and UnusableResult where a
    loss is not finite.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens: {tokens}; expected a whole number above 0")
    checkpoint = checkpoint_reader.find(Path(path))
    step = checkpoint_reader.read_manifest(checkpoint)["step"]
    plan, model = loaded_model.load(checkpoint, device)
    runtime = Runtime.of(plan.model_copy(update={"run": Run(device=device, precision=precision)}))  # type: ignore[arg-type]
    if isinstance(model, VisionTransformer):
        if tokens is not None:
            raise InputError(f"tokens: {tokens}; the run's model reads images, expected no such limit")
        scored = evaluate_images.score(checkpoint, plan, model, runtime, data, reading, reporter or NullReporter())
    else:
        scored = _score_text(checkpoint, plan, model, runtime, data, tokens, reading, reporter or NullReporter())
    return {
        "kind": KIND,
        "checkpoint": str(checkpoint),
        "step": step,
        "plan": plan.hash(),
        **scored,
        "environment": {**versions(), "device": device_name(runtime.device), "precision": runtime.precision_name},
    }


def _score_text(
    checkpoint: Path,
    plan: Plan,
    model: Transformer,
    runtime: Runtime,
    data: str | Path | None,
    tokens: int | None,
    reading: dict[str, Any],
    reporter: Reporter,
) -> Record:
    """The part of a record that says what was scored, and the figures."""
    sources, warnings = _sources(plan, data, reading)
    found, left = list[Passages](), tokens
    for section, files in sources:
        found.append(passages.read(files, section, plan.decoder.vocab, held_out=data is None, limit=left))
        left = left and left - sum(len(one.tokens) for one in found[-1].passages)
    scores = _score(checkpoint, model, runtime, found, reporter)
    if not len(scores):
        names = ", ".join(section.source for section, _ in sources)
        raise InputError(f"data.source: {names}: no token to score; expected a text of two tokens or more")
    warnings += runtime.warnings
    trained_on = {plan.text.hash, *(one.hash for one in plan.text.sources)}
    read = []
    for (section, files), one in zip(sources, found, strict=True):
        warnings += one.warnings
        if data is not None and one.hash in trained_on:
            warnings.append(f"data.source: {section.source}: the model was trained on a part of it")
        part = files.why if tokens is None else f"{files.why}, its first tokens up to {tokens:,} in all"
        tokens_by = section.tokenizer if files.is_text else None
        read.append({"source": section.source, "part": part, "format": files.kind, "tokenizer": tokens_by})
        read[-1] |= {"separator": one.separator_text, "hash": one.hash}
    return {
        "data": read,
        "context": plan.decoder.context,
        **_figures(found, scores),
        "warnings": warnings,
    }


def _sources(
    plan: Plan, given: str | Path | None, reading: dict[str, Any]
) -> tuple[list[tuple[Data, Corpus]], list[str]]:
    """The data sections that are scored, with their corpora, and what to say of the tokenizer. Raises InputError."""
    own = plan.text
    if given is None:
        if reading:
            raise InputError(*(f"{key}: says how --data is read; expected --data too" for key in reading))
        parts = [part for _, part in corpus.parts(own)] or [own]
        return [(part, passages.find(part, held_out=True)) for part in parts], []
    data = Data(source=str(given), **{"tokenizer": own.tokenizer, **reading})
    is_same, is_known = _are_same(own.tokenizer, data.tokenizer), names_tokenizer(plan)
    if is_same and data.separator is None:
        data = data.model_copy(update={"separator": own.separator})
    found = passages.find(data, held_out=False)
    if found.is_text and not is_known and "tokenizer" not in reading:
        what = f"is text, and the run's data, {own.source}, hold tokens, whose tokenizer is not known"
        raise InputError(f"data.source: {given}: {what}; expected --tokenizer FILE, or bytes")
    known = own.tokenizer if is_known else "not known"
    if not found.is_text:
        return [(data, found)], [
            f"data.source: {given}: holds tokens, taken for those of the run's tokenizer ({known})"
        ]
    if is_same and is_known:
        return [(data, found)], []
    what = f"{data.tokenizer} makes the tokens; the run's tokenizer is {known}, whose ids may be others"
    return [(data, found)], [f"data.tokenizer: {what}"]


def _are_same(one: str, other: str) -> bool:
    """Whether two tokenizers are of one name, or their files have the same content."""
    paths = [Path(name, "tokenizer.json" if Path(name).is_dir() else "") for name in (one, other)]
    return one == other or (all(map(Path.is_file, paths)) and file_hash(paths[0]) == file_hash(paths[1]))


def _windows(document: int, tokens: Any, separator: int | None, context: int) -> Iterator[Window]:
    """A document's windows of up to `context` inputs and a token more; without a separator its first token is not predicted."""
    for start in range(int(separator is None), len(tokens), context):
        end = min(start + context, len(tokens))
        first = end - context - 1
        inside = np.asarray(tokens[max(0, first) : end]).astype(np.int64)
        whole = inside if first >= 0 or separator is None else np.array([separator, *inside])
        yield document, whole, end - start


def _score(
    checkpoint: Path, model: Transformer, runtime: Runtime, found: list[Passages], reporter: Reporter
) -> NDArray[np.float64]:
    """For each window its document, counted over all sources, its nats and its tokens, as columns."""
    context, vocab = model.config.context, model.config.vocab
    documents = [(one.tokens, source.separator) for source in found for one in source.passages]
    total = sum(len(tokens) for tokens, _ in documents)
    stream = (window for number, one in enumerate(documents) for window in _windows(number, *one, context))
    rows = max(1, min(TOKENS_AT_ONCE // context, LOGITS_AT_ONCE // (context * vocab)))
    scores, done, nats = list[tuple[int, float, int]](), 0, 0.0
    while sorted_ := sorted(islice(stream, rows * BATCHES_SORTED), key=lambda window: len(window[1])):
        for batch in (sorted_[first : first + rows] for first in range(0, len(sorted_), rows)):
            for token in (int(of(tokens)) for _, tokens, _ in batch for of in (np.min, np.max)):
                if not 0 <= token < vocab:
                    what = f"token {token}; expected 0 to {vocab - 1}, the model's vocabulary"
                    raise SetupError(f"data.source: {what} (a corrupt file, or one made with another tokenizer)")
            nats_B = _nats(model, runtime, batch)
            if not np.isfinite(nats_B).all():
                raise UnusableResult(f"{checkpoint}: its loss is not finite; expected a run that did not diverge")
            scores += [(number, float(loss), scored) for (number, _, scored), loss in zip(batch, nats_B, strict=True)]
            done, nats = done + sum(scored for _, _, scored in batch), nats + float(nats_B.sum())
            reporter.progress(done, total, nats / done)
    return np.array(scores)


@torch.inference_mode()
def _nats(model: Transformer, runtime: Runtime, batch: list[Window]) -> NDArray[np.float64]:
    """The nats (B,) of each window's scored tokens; shorter ones are filled up behind, where causal attention sees nothing."""
    length = max(len(tokens) for _, tokens, _ in batch) - 1
    inputs_BT = torch.zeros((len(batch), length), dtype=torch.int64)
    targets_BT = torch.full((len(batch), length), NOT_SCORED)
    for row, (_, tokens, scored) in enumerate(batch):
        whole = torch.from_numpy(tokens)
        inputs_BT[row, : len(tokens) - 1] = whole[:-1]
        targets_BT[row, len(tokens) - 1 - scored : len(tokens) - 1] = whole[-scored:]
    inputs_BT, targets_BT = runtime.to_device((inputs_BT, targets_BT))
    with runtime.autocast():
        logits_BTV = model(inputs_BT)
    logits_NV, targets_N = logits_BTV.flatten(0, 1).float(), targets_BT.flatten()
    nats_N = F.cross_entropy(logits_NV, targets_N, ignore_index=NOT_SCORED, reduction="none")
    return nats_N.view(targets_BT.shape).double().sum(1).cpu().numpy()  # type: ignore[no-any-return]


def _figures(found: list[Passages], scores: NDArray[np.float64]) -> Record:
    """Counts, loss, perplexity and bits per byte, with their standard errors, which say over what they are taken."""
    sizes = [_scored_bytes(one, source.separator) for source in found for one in source.passages]
    document_W, nats_W, tokens_W = scores.T
    at_W = document_W.astype(int)
    nats_D, tokens_D = (np.bincount(at_W, values, len(sizes)).astype(float) for values in (nats_W, tokens_W))
    (loss, by_documents), (_, by_windows) = _ratio(nats_D, tokens_D), _ratio(nats_W, tokens_W)
    # windows of one document are alike: of a few documents that differ, they alone would promise too much
    is_by_documents = len(sizes) >= FEWEST_DOCUMENTS or (by_documents or 0.0) > (by_windows or 0.0)
    over, nats, loss_se = ("documents", nats_D, by_documents) if is_by_documents else ("windows", nats_W, by_windows)
    perplexity = math.exp(loss) if loss < LARGEST_LOSS else None
    record: Record = {
        "documents": len(sizes),
        "windows": len(scores),
        "tokens": int(tokens_D.sum()),
        "bytes": None,
        "loss": loss,
        "loss_se": loss_se,
        "perplexity": perplexity,
        "perplexity_se": perplexity and loss_se and perplexity * loss_se,
        "bits_per_byte": None,
        "bits_per_byte_se": None,
        "standard_errors": {"over": over, "count": len(nats)},
    }
    if None in sizes or not any(sizes):
        return record | {"why_no_bytes": "token files don't say how many bytes their tokens stand for"}
    bytes_D = np.array(sizes, float)
    # a window's bytes: its share of its document's, by tokens
    of = bytes_D if is_by_documents else (bytes_D / np.maximum(tokens_D, 1))[at_W] * tokens_W
    bits, bits_se = _ratio(nats / math.log(2), of)
    return record | {"bytes": int(bytes_D.sum()), "bits_per_byte": bits, "bits_per_byte_se": bits_se}


def _scored_bytes(passage: Passage, separator: int | None) -> int | None:
    """The bytes of the tokens that are scored, all but the first without a separator; None where they are not known."""
    if passage.bytes_of is None:
        return None
    count = len(passage.tokens)
    return passage.bytes_of(count) - (passage.bytes_of(1) if separator is None and count else 0)


def _ratio(values: NDArray[np.float64], units: NDArray[np.float64]) -> tuple[float, float | None]:
    """The sum of values by that of units, and its standard error; None for one value. Cochran, Sampling Techniques, 6.4."""
    ratio, count = float(values.sum() / units.sum()), len(values)
    if count < 2:
        return ratio, None
    squares = float(np.square(values - ratio * units).sum())
    return ratio, math.sqrt(squares * count / (count - 1)) / float(units.sum())
