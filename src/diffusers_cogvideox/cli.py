"""The command `cogvideox <verb>`: reads options, runs the verb, prints what it returns; mistakes become a line each and exit status 2.

This module needs no library of models itself; what a verb needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import inspect
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from .conversion.options import ConvertOptions
from .generation.calibrate_options import CalibrateOptions
from .generation.plan_options import PlanOptions
from .options import DecodeOptions, EvaluateOptions, GenerateOptions, InfoOptions, MistakesError
from .training.config import TrainConfig

__all__ = ["VERBS", "Verb", "main", "parser_for"]

set_parsing_settings(docstring_parse_attribute_docstrings=True)


# --- the verbs ----------------------------------------------------------------------------------------------------------


def _generate(options: GenerateOptions) -> str:
    from .generation.generate import generate

    with _imports_set_aside():
        return "\n".join(map(str, generate(options)))


def _decode(options: DecodeOptions) -> str:
    from .generation.decode import decode

    return "\n".join(map(str, decode(options)))


def _plan(options: PlanOptions) -> str:
    from .generation.memory_plan import plan_memory

    return plan_memory(options)


def _info(options: InfoOptions) -> str:
    from .generation.info import info

    return info(options)


def _convert(options: ConvertOptions) -> str:
    from .conversion.convert import convert

    return convert(options)


def _evaluate(options: EvaluateOptions) -> str:
    from .evaluation.shapes import evaluate

    return evaluate(options)


def _calibrate(options: CalibrateOptions) -> str:
    from .generation.calibrate import calibrate

    return calibrate(options)


_TASKS = {"vae": "VAETask", "text_encoder": "TextEncoderTask", "transformer": "TransformerTask"}


def _train(config: TrainConfig) -> str:
    from .training.loop import run

    sys.stderr.write(f"training the {config.task} in {config.output}: checkpoints, metrics.jsonl, config.json; Ctrl-C stops and saves\n")
    module = importlib.import_module(f".training.{config.task}", __package__)
    final = run(config, getattr(module, _TASKS[config.task])(config), _evaluation(config))
    if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one finishes the work
        return ""
    return "\n".join([f"the trained model is in {final}", *_assembled(config, final), _curves(final.parent)])


def _evaluation(config: TrainConfig) -> Callable[[int, Any], None] | None:
    """What measures a transformer at its checkpoints, if that is asked for."""
    if not config.evaluate_prompts or config.vae is None or config.text_encoder is None:
        return None
    from .evaluation.while_training import evaluate_checkpoints

    return evaluate_checkpoints(
        config.output, prompts=config.evaluate_prompts, vae=config.vae, text_encoder=config.text_encoder, scheduler=config.scheduler
    )


def _assembled(config: TrainConfig, final: Path) -> list[str]:
    """A transformer becomes a pipeline together with the parts that it was trained on."""
    if config.task != "transformer" or config.vae is None or config.text_encoder is None:
        return []
    from .generation.assemble import assemble

    folder = assemble(
        final.parent / "pipeline", transformer=final, vae=config.vae, text_encoder=config.text_encoder, scheduler=config.scheduler
    )
    return [f"the pipeline is in {folder}"]


def _curves(folder: Path) -> str:
    from .training.curves import plot_curves

    try:
        return f"the curves are in {plot_curves([folder], folder / 'curves.png')}"
    except ImportError as error:
        return str(error)


@dataclass(frozen=True)
class Verb:
    """A sub-command: what it does in one line, the dataclass of its options, the function that takes them and returns what to print."""

    summary: str
    options: type
    run: Callable[[Any], str]
    usage: str
    optional_positionals: tuple[str, ...] = ()
    reads_file: bool = False


VERBS = {
    "generate": Verb("make videos of what a prompt says", GenerateOptions, _generate, "PROMPT"),
    "decode": Verb("make the video of saved latents", DecodeOptions, _decode, "LATENTS.safetensors"),
    "plan": Verb("tell how a model fits into your memory", PlanOptions, _plan, "MODEL"),
    "info": Verb("tell what a checkpoint is", InfoOptions, _info, "[MODEL]", ("model",)),
    "convert": Verb("turn checkpoints of one layout into another", ConvertOptions, _convert, "INPUT OUTPUT"),
    "evaluate": Verb("measure how well a model shows what prompts say", EvaluateOptions, _evaluate, "shapes [MODEL]", ("model",)),
    "calibrate": Verb("measure what feature caches cost a model", CalibrateOptions, _calibrate, "[MODEL]", ("model",)),
    "train": Verb("train a model as a YAML file says", TrainConfig, _train, "CONFIG.yaml", reads_file=True),
}


# --- their options ------------------------------------------------------------------------------------------------------


class _HelpFormatter(DefaultHelpFormatter):
    """The help of each option as it is written, with its default where that says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = " ".join((action.help or "").split())
        silent = isinstance(action.default, bool) or action.default in (None, argparse.SUPPRESS, []) or "(default:" in text
        return text if silent else f"{text} (default: %(default)s)"


class _Parser(ArgumentParser):
    """Parser of one verb: --words-with-dashes, --flag and --no-flag for booleans, errors in one line."""

    verb: Verb | None = None  # jsonargparse makes parsers of nested dataclasses too, which have none

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._groups_of_owners: dict[type, Any] = {}
        super().__init__(*args, **kwargs)

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Add what jsonargparse derives from a field, in the spelling of the command line."""
        verb = getattr(self, "verb", None)  # jsonargparse lends this method to its groups of nested options
        if options.get("type") is bool:
            options.pop("type")
            options["action"] = ActionYesNo(no_prefix="no-")
        owner = verb and _owner(verb, names[0])
        if verb is not None:
            names, options = _spelled(verb, names, options)
        if owner is None:
            return super().add_argument(*names, **options)
        return self._group_of(owner).add_argument(*names, **options)

    def _group_of(self, owner: type) -> Any:
        """The group of the help that is named after the first sentence of a base class of the options."""
        if owner not in self._groups_of_owners:
            title, _, rest = (inspect.getdoc(owner) or "").partition(". ")
            self._groups_of_owners[owner] = self.add_argument_group(title.lower(), rest)
        return self._groups_of_owners[owner]

    def error(self, message: str, ex: Exception | None = None) -> Any:  # noqa: ARG002 - the signature is jsonargparse's
        """Print one line and exit with status 2."""
        like_file = self.verb is not None and self.verb.reads_file
        self.exit(2, f"{self.prog}: error: {_in_one_line(message, like_file)}\n")


def _owner(verb: Verb, name: str) -> type | None:
    """The base class that an option comes from; None for the verb's own."""
    field = name.removeprefix("--")
    return next((base for base in verb.options.__mro__[1:] if field in vars(base).get("__annotations__", {})), None)


def _spelled(verb: Verb, names: tuple[str, ...], options: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names and options of an argument in the spelling of the command line."""
    field = names[0].removeprefix("--")
    if choices := _choices(get_type_hints(verb.options).get(field)):
        options["metavar"] = f"{{{','.join(choices)}}}"
    if options.get("default") == ():  # can be given several times
        options |= {"action": "append", "default": [], "metavar": field.upper()}
    if field in verb.optional_positionals:
        names, options["nargs"] = (field,), "?"
    if not names[0].startswith("-"):
        options.setdefault("metavar", field.upper())
    elif not verb.reads_file:  # where it does, flags are spelled like the keys of the file
        names = tuple(name.replace("_", "-") for name in names)
    return names, options


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a Literal or Optional[Literal]."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next(filter(None, map(_choices, get_args(annotation))), ()) if get_origin(annotation) in (Union, UnionType) else ()


def _in_one_line(message: str, like_file: bool) -> str:
    """What jsonargparse says about a value of the wrong type, shortly; other messages without their line breaks.

    With `like_file`, flags are spelled like the keys of a file.
    """
    key = re.search(r'[Kk]ey "([^"]+)"', message)
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    kinds = [kind for kind in re.findall(r"Expected an? (.*?)(?:\. Got|$)", message, re.MULTILINE) if "NoneType" not in kind]
    if not (key and value and kinds):
        return re.sub(r"^unrecognized arguments: (?!-).*", r"\g<0> (a text with spaces needs quotes)", " ".join(message.split()))
    names = [re.sub(r"typing\.Literal\[(.*)\]|<class '(.*)'>", lambda m: f"one of {m[1]}" if m[1] else m[2], kind) for kind in kinds]
    return f"--{key[1] if like_file else key[1].replace('_', '-')} {value[1]} is not possible: expected {' or '.join(names)}"


def parser_for(name: str) -> ArgumentParser:
    """The parser of one verb."""
    verb = VERBS[name]
    usage = f"cogvideox {name} {verb.usage} [options]"
    parser = _Parser(
        prog=f"cogvideox {name}",
        usage=usage,
        description=inspect.getdoc(verb.options),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.verb = verb
    if verb.reads_file:
        parser.add_argument("--config", action=ActionConfigFile, help="The YAML file; the flag may be left out before a first argument.")
    parser.add_class_arguments(verb.options, as_group=False, as_positional=not verb.reads_file)
    return parser


def _parse(name: str, arguments: Sequence[str]) -> Any:
    """The options of a verb from its arguments; exits with status 2, or 0 after help."""
    parser, verb = parser_for(name), VERBS[name]
    if verb.reads_file and arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    found = parser.instantiate(parser.parse_args(arguments))
    given = {field.name: found[field.name] for field in fields(verb.options)}
    several = {field.name: tuple(given[field.name]) for field in fields(verb.options) if field.default == ()}
    return verb.options(**given | several)


# --- the command --------------------------------------------------------------------------------------------------------


def _top_parser() -> argparse.ArgumentParser:
    """The parser of everything before the verb's own arguments."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{verb.summary}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="cogvideox",
        usage="cogvideox VERB ...",
        description="Make, inspect, convert, measure and train CogVideoX video models.",
        epilog=f'verbs:\n{verbs}\n\n`cogvideox VERB --help` tells what a verb needs. Try: cogvideox generate "a red circle moves right"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {importlib.metadata.version('diffusers-cogvideox')}")
    parser.add_argument("verb", metavar="VERB", choices=list(VERBS), help="what to do: one of the verbs below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _stop_like_ctrl_c() -> None:
    """Batch systems send SIGTERM, and in a shell's background SIGINT is ignored: both shall stop a run with nothing half done."""
    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.default_int_handler)


@contextmanager
def _shown_log(verb: str) -> Iterator[None]:
    """Show on stderr what this package logs while the block runs: what becomes of pictures, where a run goes on, warnings."""
    handler, logger = logging.StreamHandler(sys.stderr), logging.getLogger(__package__)
    handler.setFormatter(logging.Formatter(f"cogvideox {verb}: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def _imports_set_aside() -> Iterator[None]:
    """Spare collections of garbage, of which every stage of a memory plan makes one, the walk over all that was imported: 0.25 s each.

    Where a program that calls `main` has set aside its own, that stays as it is.
    """
    ours = not gc.get_freeze_count()
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of the process. Returns the exit status: 0, 2 after a mistake, 130 after Ctrl-C."""
    given = _top_parser().parse_args(arguments)
    _stop_like_ctrl_c()
    try:
        options = _parse(given.verb, given.arguments)
        with _shown_log(given.verb):
            text = VERBS[given.verb].run(options)
    except KeyboardInterrupt:
        sys.stderr.write(f"\ncogvideox {given.verb}: stopped\n")
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        lines = error.lines if isinstance(error, MistakesError) else [str(error)]
        sys.stderr.write(f"cogvideox {given.verb}: error: " + "\n  ".join(" ".join(line.split()) for line in lines) + "\n")
        return 2
    if text:  # of several processes, the first one speaks
        sys.stdout.write(f"{text}\n")
    return 0
