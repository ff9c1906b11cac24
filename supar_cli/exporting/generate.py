"""Text that a run's model makes of a prompt, token by token, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from math import inf
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from supar_cli.data import tokenizer as tokenizers
from supar_cli.errors import InputError, UnusableResult
from supar_cli.exporting import loaded_model
from supar_cli.exporting.tokenizer_files import names_tokenizer
from supar_cli.models.transformer import KeyValues, Transformer
from supar_cli.planning.plan import Plan
from supar_cli.streams import stream

TOKENS = 200  # chosen: a paragraph or two
READ_AT_ONCE = 512  # chosen: tokens of a prompt whose logits, and scores of attention, fit a small machine's memory

Logits = NDArray[np.float64]


def generate(
    path: str | Path,
    prompt: str | None = None,
    *,
    tokens: int = TOKENS,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
    device: str = "auto",
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """The prompt as the model reads it, and then the text of up to `tokens` more tokens, in pieces as they come.

    Without a prompt it begins a document, and it stops where a document ends. At temperature 0 each token is the likeliest;
    else it is drawn, from the `top_k` likeliest or from all, by a random number of (seed, position). A text longer than the
    model's context goes on from the newest half of that. `tokenizer`: bytes or a tokenizer.json; by default the run's. `note`
    gets what there is to say of the text. Raises InputError, SetupError; with the text UnusableResult for logits not finite.
    """
    _check(tokens, temperature, top_k)
    plan, model = loaded_model.load(Path(path), device)
    if not isinstance(model, Transformer):
        raise InputError(f"{path}: its model reads images and makes no text; expected a run of a language model")
    known = _tokenizer_of(plan, tokenizer)
    ids = _first_tokens(prompt, known, model.config.vocab)

    def choose(logits_V: Logits, position: int) -> int:
        if not np.isfinite(logits_V).all():
            what = f"the logits after {position} tokens are not finite"
            raise UnusableResult(f"{path}: {what}; expected a run that did not diverge")
        if not temperature:
            return int(logits_V.argmax())
        return draw(logits_V, temperature, top_k, (int(stream(seed, "text", position).random_raw()) >> 11) / 2**53)

    made = _continue(model, ids, tokens, choose, known.separator, note)
    return filter(None, known.decode(made if prompt is None else chain(ids, made)))


def draw(logits_V: Logits, temperature: float, top_k: int | None, number: float) -> int:
    """The token that a number from 0 up to 1 draws by the tokens' chances, of which the likeliest come first."""
    order_K = np.argsort(-logits_V, kind="stable")[:top_k]
    with np.errstate(over="ignore"):  # near temperature 0
        ends_K = np.exp((logits_V[order_K] - logits_V[order_K[0]]) / temperature).cumsum()
    return int(order_K[np.searchsorted(ends_K / ends_K[-1], number, side="right")])


def _check(tokens: int, temperature: float, top_k: int | None) -> None:
    """Raise InputError for all that is wrong with how tokens are to be chosen."""
    problems = []
    if tokens < 1:
        problems.append(f"tokens: {tokens}; expected a whole number above 0")
    if not 0 <= temperature < inf:
        problems.append(f"temperature: {temperature}; expected 0, for the likeliest tokens, or a number above it")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k: {top_k}; expected a whole number above 0")
    if top_k is not None and temperature == 0:
        problems.append("top_k: at temperature 0 nothing is drawn; expected a temperature above 0 too")
    if problems:
        raise InputError(*problems)


def _tokenizer_of(plan: Plan, named: str | None) -> tokenizers.Tokenizer:
    """The named tokenizer, by default that of a plan's data. Raises InputError, SetupError."""
    if named is None and not names_tokenizer(plan):
        what = "holds tokens, or is not here, and the plan names no tokenizer"
        raise InputError(f"data.source: {plan.text.source}: {what}; expected --tokenizer, bytes or a tokenizer.json")
    return tokenizers.load(plan.text if named is None else plan.text.model_copy(update={"tokenizer": named}))


def _first_tokens(prompt: str | None, known: tokenizers.Tokenizer, vocab: int) -> list[int]:
    """The tokens that the text begins with: the prompt's, or the one between documents. Raises InputError."""
    if prompt is None:
        if known.separator is None:
            what = "is missing, and the tokenizer has no token between documents to begin one with"
            raise InputError(f"prompt: {what}; expected a prompt")
        ids = [known.separator]
    else:
        try:
            prompt.encode("utf-8", "surrogateescape" if isinstance(known, tokenizers.Bytes) else "strict")
        except UnicodeEncodeError:
            raise InputError("prompt: is not UTF-8; expected text") from None
        (found,) = known.encode(iter([prompt]))
        ids = found.tolist() if known.separator is None else found[:-1].tolist()
    if not ids:
        raise InputError("prompt: has no token; expected text, or no prompt, which begins a document")
    if max(ids) >= vocab:
        what = f"token {max(ids)} is outside of the model's vocabulary of {vocab}"
        raise InputError(f"prompt: {what}; expected the tokenizer that the run was trained with")
    return ids


def _continue(
    model: Transformer,
    ids: list[int],
    count: int,
    choose: Callable[[Logits, int], int],
    end: int | None,
    note: Callable[[str], None],
) -> Iterator[int]:
    """Up to `count` tokens that follow others, before one that ends a document.

    Each comes when it is chosen by its logits (V,) and its position in the text.
    """
    context = model.config.context
    kept = context - context // 2
    window, unread, cache = ids, ids, model.new_cache()
    for position in range(len(ids), len(ids) + count):
        if len(window) > context:
            if len(window) == position:  # nothing was forgotten before
                note(f"beyond the context of {context} tokens the oldest half of it was forgotten each time")
            window = unread = window[-kept:]
            cache = model.new_cache()
        token = choose(_last_logits(model, unread, cache), position)
        if token == end:
            note(f"the document ended after {position - len(ids)} new tokens")
            return
        yield token
        window, unread = [*window, token], [token]


@torch.inference_mode()
def _last_logits(model: Transformer, ids: list[int], cache: list[KeyValues]) -> Logits:
    """The logits (V,) after tokens that follow those of the cache."""
    tokens_BT = torch.tensor([ids], device=model.embedding.weight.device)
    for first in range(0, len(ids), READ_AT_ONCE):
        logits_BTV = model(tokens_BT[:, first : first + READ_AT_ONCE], cache=cache)
    return logits_BTV[0, -1].double().cpu().numpy()  # type: ignore[no-any-return]
