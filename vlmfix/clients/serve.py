"""``vlmfix serve``: ``transformers serve`` with a patch, whose methods a request may choose for itself."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vlmfix.clients.options import add_program, methods_of, verb_with_method, words_behind_dashes
from vlmfix.errors import MethodError, UnsupportedFeatureError, VlmfixError, how_to_install

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FIELD = "vlmfix"
"""The field of a request that names its methods, as ``generate(vlmfix=...)`` takes them; ``null`` asks for none."""


_ABOUT = """\
Serve a vision-language model with a patch, by transformers serve: the API of OpenAI, with streams.

  vlmfix serve vhr --set alpha=1.5 -- MODEL --port 8000
  vlmfix serve none -- MODEL                                  only requests that name methods are patched
  vlmfix serve recipe.json -- MODEL --device cuda:0 --dtype bfloat16

What stands behind -- goes to transformers serve as it is. A request chooses methods of its own in an extra field:

  client.chat.completions.create(model=MODEL, messages=..., extra_body={"vlmfix": {"method": "pai", "alpha": 0.3}})
"""


def add_serve(verbs: Any) -> argparse.ArgumentParser:
    """Add the verb to a command line's subparsers; import nothing heavy."""
    parser = verb_with_method(verbs, "serve", "-- MODEL [OPTION ...]", _ABOUT)
    add_program(parser, "model", "what transformers serve takes: the model, and its options")
    return parser


def run(options: argparse.Namespace, *, show: Callable[[str], None]) -> None:
    """Serve until the server is stopped, and say what the patch did.

    Raises:
        VlmfixError: The packages of the server are missing, or the model cannot be patched so.
        SystemExit: The server's own.
    """
    from vlmfix.clients.run import run_patched

    words = words_behind_dashes(options)
    with methods_by_request():
        run_patched(methods_of(options), ["transformers", "serve", *words], show)


@contextmanager
def methods_by_request() -> Iterator[None]:
    """Let requests to ``transformers serve``, started in this block, name their methods.

    Raises:
        VlmfixError: Packages of the server are missing, or this release of transformers has none.
    """
    from transformers.utils import import_utils

    try:
        from transformers.cli.serving import server, utils
    except ImportError as error:
        remedy = "type: pip install -U transformers"
        raise VlmfixError(f"this release has no transformers serve ({error}); {remedy}") from error
    if not import_utils.is_serve_available():
        raise VlmfixError(f"this needs the packages of the server; type: {how_to_install('serve')}")
    stock = server.build_server

    @functools.wraps(stock)
    def build_server(*args: Any, **kwargs: Any) -> Any:
        for handler in (*args, *kwargs.values()):
            if hasattr(handler, "_resolve_model"):
                _let_requests_choose(handler)
        app = stock(*args, **kwargs)
        app.add_exception_handler(VlmfixError, _refusal)
        return app

    server.build_server = build_server
    try:
        with _stops_at_strings(utils.GenerateManager):
            yield
    finally:
        server.build_server = stock


@contextmanager
def _stops_at_strings(manager: type) -> Iterator[None]:
    """Let what generates be given a tokenizer where the server has a processor, which cannot look up ``stop``."""
    names = ("generate_streaming", "generate_non_streaming")
    stock = {name: getattr(manager, name) for name in names}

    def with_tokenizer(generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def called(self: Any, model: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
            return generate(self, model, getattr(processor, "tokenizer", processor), *args, **kwargs)

        return called

    for name, generate in stock.items():
        setattr(manager, name, with_tokenizer(generate))
    try:
        yield
    finally:
        for name, generate in stock.items():
            setattr(manager, name, generate)


def _let_requests_choose(handler: Any) -> None:
    """Give a handler of requests, for each of them, the model under the methods that the request names."""
    validate, resolve = handler._validate_request, handler._resolve_model

    def validate_request(body: dict[str, Any]) -> None:
        validate({key: value for key, value in body.items() if key != FIELD})

    def resolve_model(body: dict[str, Any]) -> Any:
        model_id, model, processor = resolve(body)
        return model_id, _chosen(model, body), processor

    handler._validate_request, handler._resolve_model = validate_request, resolve_model


def _chosen(model: PreTrainedModel, body: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model with the same weights under the methods of a request, or the model itself.

    Raises:
        VlmfixError: The methods are unknown, the model takes none, or they give no stream.
    """
    from vlmfix.patching import find_patch, under_methods

    if FIELD in body:
        wanted = body[FIELD]
        for name in _strings(wanted):
            if name.endswith(".json"):
                raise MethodError(f"A request names methods, not files of the server: {name!r}.")
        model = under_methods(model, "none" if wanted is None else wanted)
    patch = find_patch(model)
    searching = [each.name for each in patch.methods if each.searches] if patch is not None else []
    if body.get("stream") and searching:
        raise UnsupportedFeatureError(
            f"{searching[0]} knows its answer only at the end of its search. Ask for it without a stream."
        )
    return model


def _strings(wanted: Any) -> list[str]:
    """Return the strings in lists of any depth."""
    if isinstance(wanted, list):
        return [name for each in wanted for name in _strings(each)]
    return [wanted] if isinstance(wanted, str) else []


async def _refusal(request: Any, error: VlmfixError) -> Any:
    """Answer a refused request with its reason, as OpenAI's clients read it."""
    from fastapi.responses import JSONResponse

    told = {"message": str(error), "type": type(error).__name__, "param": FIELD, "code": None}
    return JSONResponse({"error": told}, status_code=400)
