"""`unisd prepare`: what a training run reads from caches. Heavy imports are inside, as in `commands.py`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from unisd_megatron.caches import CACHE_SETTINGS, Caches
from unisd_megatron.cli.commands import prepare_libraries, say
from unisd_megatron.cli.flags import Parser, command, flag
from unisd_megatron.config import Data, setting_type
from unisd_megatron.errors import ConfigError
from unisd_megatron.validation import validate_caches


def add_prepare(subparsers: Any) -> None:
    """Adds `prepare` with its three ways."""
    parser = subparsers.add_parser("prepare", help="Caches that training reads: negatives, instructions, embeddings.")
    ways = parser.add_subparsers(dest="way", required=True, metavar="negatives|induction|embeddings", parser_class=Parser)
    one = command(ways, "negatives", negatives, "Wrong solutions written by the model, each shown to be wrong.")
    _add_flags(one, CACHE_SETTINGS["negatives"])
    _add_model(one)
    one = command(ways, "induction", induction, "Instructions that the model induces from solved examples.")
    _add_flags(one, CACHE_SETTINGS["induction"])
    _add_model(one)
    one = command(ways, "embeddings", embeddings, "Embeddings of the questions, for --fewshot_method retrieval.")
    _add_flags(one, CACHE_SETTINGS["embeddings"])


def _add_flags(parser: argparse.ArgumentParser, names: frozenset[str]) -> None:
    flag(parser, "dataset", required=True, help="task; a wrong name lists them")
    flag(parser, "data_path", metavar="FILE", help="its training file instead of the hub")
    flag(parser, "num_train_examples", type=int, metavar="N", help="only the first n examples")
    flag(parser, "semantics", choices=["corrected", "released"], default="corrected", help="as the run's (corrected)")
    for item in dataclasses.fields(Caches):
        if item.name in names | {"cache_dir"}:
            kind, choices, _ = setting_type(Caches, item.name)
            text = f"{item.metadata['help']} ({item.default})"
            metavar = None if choices else {int: "N", float: "X", str: "S"}[kind]
            flag(parser, item.name, type=kind, choices=choices, default=item.default, metavar=metavar, help=text)


def _add_model(parser: argparse.ArgumentParser) -> None:
    flag(parser, "model_name", required=True, help="checkpoint that the run starts from")
    flag(parser, "batch_size", type=int, default=64, metavar="N", help="prompts answered between two saves (64)")


def negatives(request: argparse.Namespace) -> int:
    order = _order(request)
    from unisd_megatron.prepare import negatives as room

    say(room.prepare(order, request.batch_size))
    return 0


def induction(request: argparse.Namespace) -> int:
    order = _order(request)
    from unisd_megatron.prepare import induction as room

    say(room.prepare(order, request.batch_size))
    return 0


def embeddings(request: argparse.Namespace) -> int:
    order = _order(request)
    from unisd_megatron.prepare import embeddings as room

    say(room.prepare(order))
    return 0


def _order(request: argparse.Namespace) -> Any:
    """The request, checked before torch is loaded as far as it can be."""
    given = vars(request)
    caches = Caches(**{item.name: given[item.name] for item in dataclasses.fields(Caches) if item.name in given})
    validate_caches(caches)
    for name in ("num_train_examples", "batch_size"):
        if given.get(name) is not None and given[name] < 1:
            raise ConfigError(f"--{name} is {given[name]}; it must be at least 1")
    prepare_libraries()
    from unisd_megatron.prepare.order import Order

    data = Data(dataset=request.dataset, data_path=request.data_path, num_train_examples=request.num_train_examples)
    return Order(data, request.semantics, caches, given.get("model_name"), writes=True)
