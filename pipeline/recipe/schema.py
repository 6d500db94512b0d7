"""The recipe: one typed, frozen tree. Every section documents its own keys.

Reading, overriding and error messages are in ``loader.py``; ``evaluation.py`` holds the section ``eval``,
``training.py`` what trl's SFTConfig may be given.
Nothing here imports torch, so that ``--help`` and the schema stay instant.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.recipe.evaluation import Ensemble as Ensemble
from pipeline.recipe.evaluation import Eval
from pipeline.recipe.evaluation import McDropout as McDropout
from pipeline.recipe.section import Contradiction, PathOrHubId, Section

FORMAT_COLUMNS = {"alpaca": ("instruction", "input", "output"), "prompt-completion": ("prompt", "completion")}
"""Columns of each data format; the last is the completion."""


class Base(Section):
    """The frozen base model."""

    model: PathOrHubId
    """Causal language model in Hugging Face format: a folder or a Hub id."""
    revision: str = "main"
    """Git revision on the Hub; pin a commit hash for a result that must be reproducible."""
    tokenizer: PathOrHubId | None = None
    """Tokenizer, where it is not the model's own."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """bitsandbytes storage of the frozen weights: 4-bit NormalFloat, LLM.int8(), or none."""
    double_quantization: bool = True
    """Quantise nf4's block constants too (about 0.4 bit per weight less, QLoRA section 3)."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Compute type. float16 is for GPUs without bfloat16 (V100, T4)."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation, by transformers' name."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Off unless you have read that code."""

    @model_validator(mode="after")
    def _attention_takes_the_dtype(self) -> Base:
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise Contradiction(
                (
                    ("attention", "dtype"),
                    "flash_attention_2 computes in 16 bit only, and base.dtype is float32: use sdpa, or bfloat16",
                )
            )
        return self


class Dropout(Section):
    """LoRA Dropout (Lin et al., arXiv 2404.09610, equations 1-3 and 7)."""

    rate: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Probability p with which an input feature of A or an output feature of B is dropped. 0 is plain LoRA."""
    instances: int = Field(default=1, ge=1)
    """Mask instances N over which each example's loss is averaged (equation 7). Cost grows with N."""
    sampling: Literal["instance", "example"] = "example"
    """`instance`: N masks shared by the micro-batch, as in the paper. `example`: every example draws its own."""
    execution: Literal["auto", "batched", "sequential"] = "auto"
    """The N copies as one batch of N x rows, or one after another in 1/N of its activation memory; `auto` picks."""
    rescale: bool = True
    """Scale each kept feature by 1/(1-p), so that the mean adapter is BA. `false` is equation 2 verbatim."""
    balanced: bool = False
    """Keep each feature in about (1-p) N of the N instances: less noise between them, each one as random as before."""
    rate_pattern: dict[str, Annotated[float, Field(ge=0.0, lt=1.0)]] = {}
    """Other rates by module name: its end, or a regular expression, as in peft's `rank_pattern`."""
    initial_rate: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Rate at the first step; it moves linearly to `rate` (or the pattern's) at the last. The ensemble has the last."""

    @model_validator(mode="after")
    def _instances_differ(self) -> Dropout:
        problems: list[tuple[tuple[str, ...], str]] = []
        if not self.masked and self.instances > 1:
            problems.append(
                (
                    ("rate", "instances"),
                    f"at rate 0 all {self.instances} instances are the same model, at {self.instances} times the cost: "
                    "set adapter.dropout.instances to 1",
                )
            )
        if self.balanced and self.instances == 1:
            problems.append(
                (("balanced", "instances"), "one instance has nothing to be balanced with: set instances to 2 or more")
            )
        if self.initial_rate is not None and not self.rescale:
            problems.append(
                (
                    ("initial_rate", "rescale"),
                    "a rate that changes needs rescale: true, since without it the mean adapter would change with it",
                )
            )
        if self.initial_rate and not self.masked:
            problems.append(
                (
                    ("initial_rate", "rate"),
                    "a rate that ends at 0 leaves no masks for the ensemble, which has the last rate: give a small one",
                )
            )
        if problems:
            raise Contradiction(*problems)
        return self

    @property
    def masked(self) -> bool:
        """Whether any layer is masked."""
        return max(self.rate, *self.rate_pattern.values(), 0.0) > 0


class AdaLora(Section):
    """AdaLoRA (Zhang et al., arXiv 2303.10512): how the budget of ranks falls, and how the layers compete for it."""

    initial_rank: int | None = Field(default=None, ge=2)
    """Rank of every layer at the start; it falls to `adapter.rank` on average. None: 1.5 times that, rounded up."""
    warm_up: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the training steps, at least one, before ranks begin to fall."""
    final: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Share of the training steps at the end, with the ranks that were then found."""
    interval: int = Field(default=10, ge=1)
    """Steps between two allocations. A pruned direction can come back in between; with 1 it never does."""
    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Smoothing of the importance over steps (equation 9)."""
    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    """Smoothing of its uncertainty over steps (equation 10)."""
    orthogonality: float = Field(default=0.5, ge=0.0)
    """Weight of the term in the loss that keeps the columns of P and the rows of Q orthonormal (equation 4)."""

    @model_validator(mode="after")
    def _time_to_allocate(self) -> AdaLora:
        if self.warm_up + self.final >= 1:
            raise Contradiction(
                (
                    ("warm_up", "final"),
                    f"found {self.warm_up}, and adapter.adalora.final {self.final}, which leave no step in which ranks "
                    "could fall: together they must be below 1",
                )
            )
        return self


class Adapter(Section):
    """The peft adapter."""

    method: Literal["lora", "adalora"] = "lora"
    """`lora`, or `adalora`, whose training shares a budget of ranks out over the layers."""
    rank: int = Field(default=16, ge=1)
    """Rank r of B @ A; with `adalora` the average over the layers at the end."""
    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is multiplied by alpha / rank, with `adalora` by alpha / initial rank."""
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Every linear layer but the output head, or a list of module names as in peft."""
    target_parameters: list[str] = []
    """Fused or expert weights that are no modules of their own, as in peft, e.g. `mlp.experts.gate_up_proj`."""
    rank_stabilized: bool = False
    """rsLoRA: the adapter's output is multiplied by alpha / sqrt(rank)."""
    input_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """peft's own `lora_dropout` on the adapter's input, fresh per token: a baseline, not LoRA Dropout."""
    dropout: Dropout = Dropout()
    """LoRA Dropout."""
    adalora: AdaLora = AdaLora()
    """How `method: adalora` shares the ranks out."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> Adapter:
        problems: list[tuple[tuple[str, ...], str]] = []
        if self.input_dropout > 0 and self.dropout.masked:
            problems.append(
                (
                    ("input_dropout", "dropout.rate"),
                    f"found {self.input_dropout} beside adapter.dropout.rate {self.dropout.rate}; the two regularisers "
                    "are compared, not combined: set one of them to 0",
                )
            )
        if self.input_dropout > 0 and self.target_parameters:
            problems.append(
                (
                    ("input_dropout", "target_parameters"),
                    "peft cannot put its own dropout before a fused weight: set input_dropout to 0",
                )
            )
        problems += self._adalora_problems() if self.method == "adalora" else self._lora_problems()
        if problems:
            raise Contradiction(*problems)
        return self

    def _lora_problems(self) -> list[tuple[tuple[str, ...], str]]:
        """What plain LoRA cannot mean."""
        if self.adalora == AdaLora():
            return []
        return [
            (("adalora", "method"), "these keys are for adapter.method adalora, and it is lora: set it, or drop them")
        ]

    def _adalora_problems(self) -> list[tuple[tuple[str, ...], str]]:
        """What AdaLoRA, as peft has it, cannot carry out."""
        problems: list[tuple[tuple[str, ...], str]] = []
        if self.initial_rank <= self.rank:
            problems.append(
                (
                    ("adalora.initial_rank", "rank"),
                    f"ranks fall from adalora.initial_rank to adapter.rank, found {self.initial_rank} and {self.rank}: "
                    "raise adapter.adalora.initial_rank, or leave it out",
                )
            )
        if self.rank_stabilized:
            problems.append(
                (
                    ("rank_stabilized", "method"),
                    "with adapter.method adalora peft divides alpha by the initial rank, never by its root: set "
                    "rank_stabilized to false",
                )
            )
        if self.target_parameters:
            problems.append(
                (
                    ("target_parameters", "method"),
                    "with adapter.method adalora peft adapts modules only: leave target_parameters out, or use method: "
                    "lora",
                )
            )
        if self.dropout.rate_pattern and not self.dropout.rescale:
            problems.append(
                (
                    ("dropout.rate_pattern", "dropout.rescale"),
                    "with adapter.method adalora peft has one alpha for all layers, and adapter.dropout.rescale false "
                    "needs one for each rate: set it to true",
                )
            )
        return problems

    @property
    def initial_rank(self) -> int:
        """Rank of every layer when training begins."""
        if self.method == "lora":
            return self.rank
        return self.adalora.initial_rank or -(-3 * self.rank // 2)


class Source(Section):
    """One file, folder or Hub dataset of instruction rows."""

    path: PathOrHubId
    """A json, jsonl or parquet file, a folder of them, or a Hub dataset id."""
    format: Literal["alpaca", "prompt-completion"] = "alpaca"
    """`alpaca`: instruction, input, output. `prompt-completion`: prompt, completion."""
    columns: dict[str, str] = {}
    """Your column for each of the format's columns, e.g. `{instruction: question, output: answer}`."""
    prompt: str | None = None
    """Jinja2 template of the prompt over the row's columns; replaces the format's own. The completion follows it."""
    subset: str | None = None
    """Hub dataset configuration."""
    split: str = "train"
    """Hub dataset split."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first rows."""

    @model_validator(mode="after")
    def _columns_belong_to_the_format(self) -> Source:
        known = FORMAT_COLUMNS[self.format]
        problems = [
            (
                (f"columns.{column}",),
                f"the format {self.format} has the columns {', '.join(known)}; `columns` maps one of them to yours, "
                f"e.g. {{{known[-1]}: {self.columns[column]}}}",
            )
            for column in self.columns
            if column not in known
        ]
        if problems:
            raise Contradiction(*problems)
        return self


class Validation(Section):
    """Held-out rows, for the validation loss: a fraction of the training rows, or a source of their own."""

    fraction: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Part of the training rows to hold out, drawn by the recipe's seed."""
    source: Source | None = None
    """Held-out rows of their own."""
    probe_rows: int = Field(default=256, ge=1)
    """Training rows, fixed by the seed, whose loss is measured like validation: their difference is the gap."""

    @model_validator(mode="after")
    def _one_origin(self) -> Validation:
        if (self.fraction is None) == (self.source is None):
            raise Contradiction(
                (
                    ("fraction", "source"),
                    f"found {'neither' if self.fraction is None else 'both'}, expected exactly one of fraction (a part "
                    "of the training rows) and source (rows of their own)",
                )
            )
        return self


class Data(Section):
    """Instruction data. The loss is on completions only."""

    train: list[Source] = Field(min_length=1)
    """Training rows, concatenated in this order."""
    validation: Validation | None = None
    """Held-out rows; none measures no validation loss and no generalisation gap."""
    max_length: int = Field(default=512, ge=8)
    """Tokens per row, prompt and completion together; longer rows lose their end."""


class Distributed(Section):
    """What DeepSpeed shards. The number of processes is the launcher's, not the recipe's."""

    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 0 replicates, 1 shards optimizer states, 2 also gradients (an adapter's are small, and are then sent
    after every micro-batch, not once per step), 3 also the (4-bit) weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep optimizer states (ZeRO 1-3), or weights too (ZeRO 3), in CPU memory."""
    communication_log: bool = False
    """Measure the time in DeepSpeed's collectives. It waits for each of them: for a diagnosis, not for speed."""


class Supervision(Section):
    """What ends a run that goes wrong, and how soon."""

    bad_steps: int = Field(default=3, ge=1)
    """Bad steps in a row that stop the run: a loss that is not finite or exactly 0, or a gradient not finite."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """`skip` leaves the update of a bad step out and counts it. After `bad_steps` in a row the run stops either way."""
    hang_minutes: float = Field(default=30.0, gt=0)
    """Minutes without any progress of a process, e.g. in a collective that never ends, after which the run is ended."""
    heartbeat_seconds: float = Field(default=10.0, gt=0)
    """Seconds between two signs of life of each process, in the run's folder."""


class Recipe(Section):
    """An experiment. How many processes run it, and where, is the launcher's business."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        json_schema_extra={"words": "letters, digits, dots, dashes and underscores, a letter or digit first"},
    )
    """Names the output folders."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seeds initialisation, data order and masks."""
    output: str = "outputs"
    """Folder of training runs; this run writes to `<output>/<name>`."""
    base: Base
    """The model that is adapted, and how it is stored."""
    adapter: Adapter = Adapter()
    """The adapter that is trained."""
    data: Data
    """What it is trained and measured on."""
    training: dict[str, Any] = {}
    """Any field of trl's SFTConfig under its own name, checked against it, unless another section owns it."""
    distributed: Distributed = Distributed()
    """How memory is shared between processes."""
    supervision: Supervision = Supervision()
    """What ends a run that goes wrong."""
    eval: Eval = Eval()
    """The evaluation stage."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> Recipe:
        zero, offload = self.distributed.zero, self.distributed.offload
        problems: list[tuple[tuple[str, ...], str]] = []
        if self.base.quantization == "int8" and zero == 3:
            problems.append(
                (
                    ("distributed.zero", "base.quantization"),
                    "zero 3 cannot shard base.quantization int8 (bitsandbytes keeps the whole int8 weight in each "
                    "layer's state): use nf4, or zero 2 or less",
                )
            )
        if offload == "all" and zero != 3:
            problems.append(
                (
                    ("distributed.offload", "distributed.zero"),
                    f"all needs distributed.zero 3, found {zero}: below it weights are not DeepSpeed's to move",
                )
            )
        if self.adapter.method == "adalora" and zero == 3:
            problems.append(
                (
                    ("distributed.zero", "adapter.method"),
                    "zero 3 and adapter.method adalora: P and Q would be shards that only a layer's own forward puts "
                    "together, and the orthogonality term and the allocation of ranks need them whole: use zero 2 or "
                    "less, or method: lora",
                )
            )
        for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            given = self.training.get(key)
            reentrant = isinstance(given, dict) and given.get("use_reentrant") is True
            if self.adapter.method == "adalora" and zero == 2 and reentrant:
                problems.append(
                    (
                        (f"training.{key}", "distributed.zero", "adapter.method"),
                        "with use_reentrant true and adapter.method adalora, P and Q get their gradient in two parts, "
                        "from the layers and from the orthogonality term, and distributed.zero 2 takes one: set "
                        "use_reentrant to false, or zero to 0 or 1",
                    )
                )
        if offload == "optimizer" and zero == 0:
            problems.append(
                (
                    ("distributed.offload", "distributed.zero"),
                    "optimizer needs distributed.zero 1, 2 or 3, found 0",
                )
            )
        if problems:
            raise Contradiction(*problems)
        return self
