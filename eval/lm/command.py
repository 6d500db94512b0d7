"""The model ``lora-dropout`` of lm-eval's own command line.

    lm_eval --model lora-dropout --model_args pretrained=...,peft=...,instances=8 --tasks ...

lm-eval looks for no plug-ins: ``launch/harness.py`` imports this module, which registers the model, and then calls
lm-eval's ``cli_evaluate``. In Python the import is all that is needed::

    import eval.lm.command
    lm_eval.simple_evaluate("lora-dropout", "peft=outputs/pocket,instances=8", tasks=["arc_easy"])
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError, ArgumentParser
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from eval.lm.arguments import ModelArguments, help_text, model_arguments
from eval.lm.kept import kept_answers
from eval.lm.model import EnsembleLM
from eval.lm.store import AnswerStore
from eval.prompt import TrainingPrompt
from eval.run import process_group
from eval.systems import System, description
from eval.tasks import OUR_TASKS
from pipeline.adapter.check import check_adapter
from pipeline.adapter.files import load_adapter
from pipeline.base import default_device, load_base, load_tokenizer
from pipeline.errors import UserError
from pipeline.process.rank import is_main, rank, world_size

NAME = "lora-dropout"
EVERY_DEVICE = ("cuda:0", "cuda", None)
"""lm-eval's default, and what means the same: this process's accelerator, or the CPU."""
NO_CACHE = (
    "--use_cache: lm-eval's cache knows a request but not the model, so this model would be given another model's "
    "answers.\nLeave it out, and keep answers with --model_args ...,answers=FOLDER: by base, adapter, masks and "
    "settings, also where the evaluation is killed."
)

NO_PICKLES = (
    "--cache_requests: lm-eval keeps requests as pickles, and a pickle can run code when it is read.\n"
    "Leave it out: they are built in seconds."
)


@register_model(NAME)
class LoraDropoutLM(EnsembleLM):
    """:class:`eval.lm.EnsembleLM`, made from ``--model_args``."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LoraDropoutLM:
        """The model of ``"key1=value1,key2=value2"``; see :meth:`create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> LoraDropoutLM:
        """Load base and adapter.

        Args:
            arg_dict: of ``--model_args``, see :func:`eval.lm.arguments.model_arguments`.
            additional_config: lm-eval's ``batch_size``, ``max_batch_size`` and ``device``.

        Raises:
            UserError: see :func:`eval.lm.arguments.model_arguments`; the adapter's files do not fit, or it does
                nothing; a device that is not there.
        """
        flags = additional_config or {}
        arguments = model_arguments(arg_dict)
        group = process_group()
        device = _device(flags.get("device"))
        _let_only_the_first_process_report()
        if arguments.adapter is not None:
            check_adapter(arguments.base, arguments.adapter, arguments.masks)
        if is_main():
            print(f"{NAME}: {_description(arguments)}", flush=True)
            for warning in arguments.warnings:
                print(f"warning: {warning}", flush=True)
        base = load_base(arguments.base, device)
        model = base.eval() if arguments.adapter is None else load_adapter(base, arguments.adapter)
        evaluated = arguments.system(model)
        recipe = arguments.recipe
        lm = cls(
            model,
            load_tokenizer(arguments.base),
            batch_size=_batch_size(flags.get("batch_size") or 1),
            members=evaluated.members,
            mode=arguments.mode,
            tokens_per_pass=arguments.how.tokens_per_pass,
            training_prompt=None if recipe is None else TrainingPrompt(recipe).render,
            group=group,
        )
        if flags.get("max_batch_size") is not None:
            lm.max_batch_size = int(flags["max_batch_size"])
        if arguments.answers is not None:
            lm.store = _kept_answers(arguments, evaluated, lm)
        if arguments.adapter is not None:
            lm.assert_adapter_active()
        return lm

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuse ``--use_cache``: its keys are requests without the model, so it hands out other models' answers."""
        if cache_hook.dbdict is not None:
            raise UserError(NO_CACHE)
        super().set_cache_hook(cache_hook)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the results call the chat template: the prompt of training, where the adapter's recipe is known."""
        if self.training_prompt is None:
            return super().chat_template(chat_template)
        return self.training_prompt("{instruction}") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """With ``--apply_chat_template``: the prompt of training, where the adapter's recipe is known.

        Raises:
            UserError: examples as turns of a conversation, which that prompt has no place for.
        """
        roles = [message["role"] for message in chat_history]
        if self.training_prompt is not None and "user" in roles[roles.index("user") + 1 :]:
            raise UserError(
                "--apply_chat_template: the prompt this adapter was trained with holds one instruction, not several "
                "turns; add --fewshot_as_multiturn false, which puts the examples into it"
            )
        return super().apply_chat_template(chat_history, add_generation_prompt)


def main() -> None:
    """lm-eval's command line with the model ``lora-dropout``, and our tasks for local data among the known ones.

    Raises:
        UserError: see :class:`LoraDropoutLM`; memory that does not suffice.
    """
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]  # deepspeed's
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"--model {NAME} --model_args takes:\n{help_text()}\n\nThe rest is lm-eval's own:\n")
    if any(argument == "-c" or argument.startswith("--use_c") for argument in arguments):
        raise UserError(NO_CACHE)  # before anything is loaded; LoraDropoutLM finds it in a --config file too
    if any(argument.startswith("--ca") for argument in arguments) or _config_file(arguments).get("cache_requests"):
        raise UserError(NO_PICKLES)
    sys.argv = [sys.argv[0], *with_our_tasks(arguments)]
    try:
        cli_evaluate()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of memory. Change, in this order:\n"
            "  1. --batch_size lower, or rows_per_pass=... in --model_args (same scores, slower)\n"
            "  2. instances lower (a smaller ensemble)\n"
            "  3. quantization=nf4, if the adapter was trained on it"
        ) from error


def _config_file(arguments: list[str]) -> dict[str, Any]:
    """What lm-eval's ``--config`` file says; nothing where lm-eval will refuse it in its own words."""
    parser = ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", "-C")
    try:
        named = parser.parse_known_args(arguments)[0].config
        found = yaml.safe_load(Path(named).read_text()) if named else None
    except (ArgumentError, OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def with_our_tasks(arguments: list[str]) -> list[str]:
    """lm-eval's command line, with the folder of our task files where it names none (it takes one)."""
    named = any(argument.startswith(("--inc", "--config", "-C")) for argument in arguments)
    asks = not arguments or {"-h", "--help"} & set(arguments)
    return arguments if named or asks else [*arguments, "--include_path", str(OUR_TASKS)]


def _description(arguments: ModelArguments) -> str:
    """What is evaluated, in words."""
    base, masks = arguments.base, arguments.masks
    stored = base.dtype if base.quantization == "none" else f"{base.quantization}, {base.dtype}"
    words = [description(arguments.name, arguments.how), f"mode {arguments.mode}", f"base {base.model} ({stored})"]
    if arguments.adapter is not None:
        words.append(f"adapter {arguments.adapter}")
    if masks is not None:
        words.append(f"masks of rate {masks.rate:g} and seed {masks.seed}")
    return "; ".join(words)


def _device(named: str | None) -> torch.device:
    """Where ``--device`` wants the model."""
    if named == "cpu":
        return torch.device("cpu")
    if named in EVERY_DEVICE:
        return default_device()
    count = torch.cuda.device_count()
    devices = [f"cuda:{index}" for index in range(count)]
    if named not in devices:
        raise UserError(f"--device: found {named!r}, expected one of {', '.join(['cpu', *devices])}")
    if world_size() > 1:
        raise UserError(
            f"--device: found {named!r}, but each of the {world_size()} processes has its own; leave it out"
        )
    return torch.device(named)


def _batch_size(named: int | str) -> int | Literal["auto"]:
    """lm-eval's ``--batch_size``; ``auto:N``, which looks N times for the size that fits, is ``auto``."""
    text = str(named)
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text.partition(":")[0] == "auto":
        return "auto"
    raise UserError(f"--batch_size: found {text!r}, expected a number of at least 1, or auto")


def _kept_answers(arguments: ModelArguments, evaluated: System, lm: EnsembleLM) -> AnswerStore:
    """The finished answers in the folder that ``answers=`` names."""
    assert arguments.answers is not None
    if arguments.base.quantization == "int8":
        raise UserError("answers: the scores of an int8 base depend on what shares a batch; leave answers= out")
    adapters = [] if arguments.adapter is None else [arguments.adapter]
    return kept_answers(arguments.answers, arguments.base, adapters, evaluated.identity, lm)


def _let_only_the_first_process_report() -> None:
    """lm-eval writes results where LOCAL_RANK is 0: on several machines once on each.

    Every process has all answers, and one report is enough. Seen in lm-eval 0.4.13 (evaluator.py, simple_evaluate);
    delete when it asks the global rank. Comes after the process has found its device.
    """
    if world_size() > 1:
        os.environ["LOCAL_RANK"] = str(rank())
