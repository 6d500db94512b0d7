"""The frozen base model and its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME, cached_file

from pipeline.errors import UserError
from pipeline.hub import PICKLES, check_local, hub_errors
from pipeline.recipe import schema

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def default_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(base: schema.Base) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer, always with a pad token.

    LLaMA-2 has none: the unknown token serves, else EOS. Labels are masked by length and not by token, so EOS
    stays a label either way.

    Raises:
        UserError: not found, gated, or unreachable.
    """
    name, key = (base.tokenizer, "base.tokenizer") if base.tokenizer else (base.model, "base.model")
    check_local(name, key)
    with hub_errors(name, key, base.revision):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_config(base: schema.Base, zero: int = 0) -> transformers.PretrainedConfig:
    """The base model's configuration, checked against the recipe before any weight is read.

    Args:
        base: the recipe's section.
        zero: the ZeRO stage it will run under.

    Raises:
        UserError: not found, gated or unreachable; already quantised by someone else where that cannot work.
    """
    check_local(base.model, "base.model")
    with hub_errors(base.model, "base.model", base.revision):
        config = AutoConfig.from_pretrained(
            base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    check_no_pickle(base)
    prequantized = config.to_dict().get("quantization_config")
    if prequantized is not None:
        method = prequantized.get("quant_method", "an unknown method")
        if zero == 3:
            raise UserError(
                f"base.model: {base.model!r} is already quantised ({method}); ZeRO-3 cannot shard weights whose "
                "storage type it did not choose.\nUse the 16-bit model and base.quantization=nf4, or zero=2."
            )
        if base.quantization != "none":
            raise UserError(
                f"base.model: {base.model!r} is already quantised ({method}) and base.quantization is "
                f"{base.quantization!r}.\nSet base.quantization=none to use it as it is, or name the 16-bit model."
            )
    return config


def check_no_pickle(base: schema.Base) -> None:
    """Refuse a folder whose weights are pickles, which can run code when they are read.

    Raises:
        UserError: names the files, and how to convert them.
    """
    folder = Path(base.model)
    pickles = sorted(file.name for file in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles and not any(folder.glob("*.safetensors")):
        raise UserError(f"base.model: {folder} has no weights in safetensors, but {', '.join(pickles[:3])}.\n{PICKLES}")


def check_length(config: transformers.PretrainedConfig, base: schema.Base, max_length: int) -> None:
    """Refuse rows longer than the positions that the base was made for.

    Raises:
        UserError: gives the longest.
    """
    longest = config.get_text_config().to_dict().get("max_position_embeddings")
    if longest is not None and max_length > longest:
        raise UserError(
            f"data.max_length: found {max_length}, but {base.model} was made for at most {longest} positions: lower it"
        )


def check_device(base: schema.Base) -> None:
    """Refuse a dtype that this machine computes wrongly or not at all.

    Raises:
        UserError: bfloat16 on a GPU without it, float16 without a GPU.
    """
    if torch.cuda.is_available():
        if base.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"base.dtype: bfloat16 is not supported by {torch.cuda.get_device_name()}.\nSet base.dtype=float16."
            )
    elif base.dtype == "float16":
        raise UserError("base.dtype: float16 trains on GPUs only, and none is visible.\nSet base.dtype=bfloat16.")


def quantization_config(base: schema.Base) -> BitsAndBytesConfig | None:
    """bitsandbytes' settings, or None for an unquantised base.

    4-bit weights are stored as the compute dtype: DeepSpeed casts parameters to its own dtype *by value*, which
    turns 4-bit codes stored as another type into noise.
    """
    dtype = DTYPES[base.dtype]
    if base.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=base.double_quantization,
            bnb_4bit_quant_storage=dtype,
        )
    if base.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return None


def load_base(base: schema.Base, device: torch.device | None = None) -> transformers.PreTrainedModel:
    """The frozen base as it is trained on and evaluated on: same quantisation, same dtype.

    Args:
        base: the recipe's section.
        device: where to put it; this process's accelerator by default. Under ZeRO-3 DeepSpeed places it.

    Raises:
        UserError: not found, gated, unreachable, or without weights in safetensors.
    """
    check_local(base.model, "base.model")
    check_no_pickle(base)
    device = device or default_device()
    quantization = quantization_config(base)
    # even None would replace the settings that an already quantised base brings along
    quantized = {} if quantization is None else {"quantization_config": quantization}
    with hub_errors(base.model, "base.model", base.revision):
        model = AutoModelForCausalLM.from_pretrained(
            base.model,
            revision=base.revision,
            dtype=DTYPES[base.dtype],
            device_map=None if is_deepspeed_zero3_enabled() else {"": device},
            attn_implementation=base.attention,
            trust_remote_code=base.trust_remote_code,
            use_safetensors=True,
            **quantized,
        )
    keep_training_kernel(model)
    return model


def hollow_base(base: schema.Base) -> transformers.PreTrainedModel:
    """The base's layers without its weights: right names and shapes in float32, every number zero.

    All elements of a tensor share one, so that the layers of a 7B model stand in milliseconds, without memory.

    Raises:
        UserError: its configuration cannot be had.
    """
    config = load_config(base.model_copy(update={"quantization": "none"}))
    with torch.device("meta"), hub_errors(base.model, "base.model", base.revision):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=base.trust_remote_code, attn_implementation="eager"
        )
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            one_number = torch.zeros(()).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(one_number, requires_grad=False))
    return model.eval()


def keep_training_kernel(model: transformers.PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for CPU inference.

    On CPUs with AVX512-BF16, ``Linear4bit.forward`` in eval mode repacks the weight in place and never returns to
    the layout whose autograd is right: one evaluation pass would change every later gradient. Seen in
    bitsandbytes 0.50.2 (nn/modules.py, Linear4bit.forward); delete when training after evaluation gives the same
    gradients without it (tests/pipeline/test_base.py shows both).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def base_identity(base: schema.Base) -> str:
    """What names the base in provenance: the Hub id with its revision, or the local folder."""
    return str(Path(base.model).resolve()) if Path(base.model).exists() else f"{base.model}@{base.revision}"


SAMPLED_BYTES = 64 * 2**20
"""Files of a base that are larger are fingerprinted by samples: hashing 13 GB at each start takes a minute."""
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


def base_fingerprint(base: schema.Base) -> str:
    """The commit of a base from the Hub; of a local folder, SHA-256 over its configuration, tokenizer and weights.

    Names, sizes and contents; of a file above :data:`SAMPLED_BYTES` 64 evenly spaced blocks of 64 KiB stand for them.
    """
    folder = Path(base.model)
    if not folder.exists():
        config = cached_file(base.model, CONFIG_NAME, revision=base.revision, local_files_only=True)
        assert config is not None  # it was loaded a moment ago
        return f"{base.model}@{Path(config).parent.name}"
    digest = hashlib.sha256()
    kinds = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt")  # what decides what it computes
    for file in sorted(file for file in folder.iterdir() if file.suffix in kinds and file.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= SAMPLED_BYTES:
            yield opened.read()
            return
        for sample in range(_SAMPLES):
            opened.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            yield opened.read(_SAMPLE_BYTES)
