"""The one typed config that all four subcommands share.

Validation accepts or refuses and never rewrites: a config holds what the user wrote, and whatever follows from it is a
property. Every field's meaning stands under it; the reference in docs/reference/config.md is generated from these texts.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

BUILTIN_TINY = "builtin:tiny"

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Switch = Literal["auto", "on", "off"]


class Section(BaseModel):
    """A part of the config: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelConfig(Section):
    """The base model: which, and how it is held in memory."""

    base: str = Field("mistralai/Mistral-7B-v0.3", min_length=1)
    """A hub id, a local folder, or `builtin:tiny` (ships with fedtune)."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the commit actually used is recorded in the run."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """How the base's linear weights are stored. The leaderboard's 4-bit is `fp4` (protocol, section 4)."""
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of forward and backward; `auto` is bf16 on a GPU that has it, fp32 elsewhere."""
    dequantize: Switch = "auto"
    """Keep 4-bit weights dequantized in memory: same values, no dequantization in every pass; `auto` where memory allows."""
    gradient_checkpointing: Switch = "auto"
    """Recompute activations in the backward pass to save memory; `auto` turns it on where memory is short."""
    trust_remote_code: bool = False
    """Run the model repository's own Python code; needs `model.revision` to be a full commit hash."""

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> Self:
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError("trust_remote_code needs model.revision to be a commit hash of 40 hex digits")
        if self.dequantize == "on" and self.quantization in ("int8", "none"):
            raise ValueError(
                f"dequantize = on needs 4-bit weights (nf4 or fp4), not {self.quantization}: "
                "int8 also quantizes activations, so its results would change"
            )
        return self


class AdapterConfig(Section):
    """The LoRA adapter (https://arxiv.org/abs/2106.09685)."""

    rank: PositiveInt = 32
    """Rank r of the update B·A."""
    alpha: PositiveInt = 64
    """The update is scaled by alpha / rank (by alpha / sqrt(rank) with rsLoRA)."""
    dropout: float = Field(0.075, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    targets: Literal["default", "all-linear"] | tuple[str, ...] = "default"
    """Module names, `all-linear`, or PEFT's default for the architecture."""
    rslora: bool = False
    """Rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapter (https://arxiv.org/abs/2402.09353)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole beside the adapter, such as `lm_head`; their weights travel in every message. One that
    the base ties to another (`lm_head` to `embed_tokens`) is trained apart from it."""

    @model_validator(mode="after")
    def _targets_are_named(self) -> Self:
        if self.targets == () or (isinstance(self.targets, tuple) and "" in self.targets):
            raise ValueError("targets must name at least one module")
        if "" in self.modules_to_save:
            raise ValueError("modules_to_save holds an empty name")
        if twice := sorted(set(self.modules_to_save) & set(self.targets if isinstance(self.targets, tuple) else ())):
            raise ValueError(f"{', '.join(twice)} cannot be both in targets and in modules_to_save")
        return self


class DataConfig(Section):
    """The instruction set and how it lies among the clients."""

    source: str | None = None
    """A hub id, `builtin:tiny`, a JSONL, JSON, CSV or Parquet file, or a folder with one such file per client."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    split: str = Field("train", min_length=1)
    """Split of a hub data set."""
    instruction: str = Field("{instruction}", min_length=1)
    """Template of the instruction; `{name}` stands for a column."""
    response: str = Field("{output}", min_length=1)
    """Template of the response, the only text that the loss is computed on."""
    partitioner: Literal["iid", "dirichlet", "natural", "files"] = "iid"
    """Equal random shares; label-skewed shares; one client per value of a column; one client per file."""
    partition_by: str | None = None
    """The column that `dirichlet` and `natural` partition by; also the label of the skew in the partition table."""
    alpha: float = Field(0.5, gt=0)
    """Concentration of `dirichlet`: small is skewed, large is even."""
    reshuffle: bool = True
    """A fresh order of each client's rows in every round; false repeats one order, as the leaderboard's template does."""

    @model_validator(mode="after")
    def _column_is_named(self) -> Self:
        if self.partitioner in ("dirichlet", "natural") and not self.partition_by:
            raise ValueError(f"partitioner = {self.partitioner} needs data.partition_by, the column to partition by")
        return self


class TrainingConfig(Section):
    """What one client does in one round."""

    batch_size: PositiveInt = 16
    """Rows in a micro-batch."""
    accumulation: PositiveInt = 1
    """Micro-batches in an optimiser step."""
    max_steps: PositiveInt = 10
    """At most so many optimiser steps a round; whichever of this and `epochs` ends first."""
    epochs: PositiveInt = 3
    """At most so many passes over the client's rows a round."""
    learning_rate_max: float = Field(5e-5, gt=0)
    """Learning rate at the start of the run; it falls by a cosine over the rounds and is constant inside a round."""
    learning_rate_min: float = Field(1e-6, ge=0)
    """Learning rate in the last round."""
    sequence_length: int = Field(512, ge=8)
    """Longest row in tokens; longer rows are cut at the end."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """torch's AdamW, or bitsandbytes' with 8-bit state, paged or not. It starts afresh in every round."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    gradient_clip: float = Field(1.0, ge=0)
    """Largest norm of a step's gradient; 0 turns clipping off."""

    @model_validator(mode="after")
    def _rates_are_ordered(self) -> Self:
        if self.learning_rate_min > self.learning_rate_max:
            raise ValueError(
                f"learning_rate_min ({self.learning_rate_min:g}) is above learning_rate_max ({self.learning_rate_max:g})"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimiser step."""
        return self.batch_size * self.accumulation


class FederationConfig(Section):
    """Who takes part, how often, and where the clients run."""

    clients: PositiveInt = 20
    """Number of clients, which is the number of partitions of the data."""
    fraction: Fraction = 0.1
    """Share of the clients that train in a round."""
    rounds: PositiveInt = 200
    """Number of rounds."""
    min_success: PositiveInt = 1
    """A round with fewer accepted replies fails the run."""
    client_timeout_s: float = Field(3600.0, gt=0)
    """A client that has not replied after so many seconds is counted as failed."""
    max_examples: PositiveInt = 1_000_000
    """The most examples that any client may claim, whatever it announces."""
    engine: Literal["in-process", "ray", "superlink"] = "in-process"
    """Where the clients run: one after another in this process, on Flower's simulation, or on a SuperLink's nodes."""

    @model_validator(mode="after")
    def _success_is_reachable(self) -> Self:
        if self.min_success > self.clients_per_round:
            raise ValueError(
                f"min_success ({self.min_success}) is above the {self.clients_per_round} clients that train in a round"
            )
        return self

    @property
    def clients_per_round(self) -> int:
        """Clients that train in a round: the fraction rounded down, at least one."""
        return max(1, int(self.clients * self.fraction + 1e-9))


class FedAvg(Section):
    """Federated averaging (https://arxiv.org/abs/1602.05629)."""

    name: Literal["fedavg"] = "fedavg"
    """Average of the clients' adapters, weighted by their numbers of examples."""


class FedProx(Section):
    """FedAvg with a proximal term on the client (https://arxiv.org/abs/1812.06127)."""

    name: Literal["fedprox"]
    """FedAvg whose clients are held near the global adapter."""
    proximal_mu: float = Field(0.01, ge=0)
    """Weight mu of the client's term mu/2 · ||w - w_global||²; 0 is FedAvg."""


StrategyOptions = FedAvg | FedProx
StrategyConfig = Annotated[StrategyOptions, Field(discriminator="name")]


class CommunicationConfig(Section):
    """What travels, and how much of it may."""

    wire_dtype: Literal["float32", "bf16", "fp16"] = "float32"
    """Number format of adapters in messages; averaging is always in float32."""
    codec: Literal["none"] = "none"
    """Compression of adapters in messages."""
    cap_mib: float = Field(200_000.0, gt=0)
    """Most MiB of training messages, both ways; the run stops before the message that would pass it."""


class CheckpointConfig(Section):
    """Which adapters are kept."""

    save_every: PositiveInt = 5
    """`peft_<round>` is written after every so many rounds and after the last."""


class FedTuneConfig(Section):
    """Everything that decides a run."""

    challenge: str | None = None
    """The challenge whose values this config started from."""
    recipe: str | None = None
    """The recipe whose values this config started from."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    strategy: StrategyConfig = FedAvg()
    communication: CommunicationConfig = CommunicationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of everything random: partitions, sampling, initialisation, order of rows, dropout."""

    def is_checkpoint(self, server_round: int) -> bool:
        """Whether `peft_<server_round>` is kept (rounds count from 1)."""
        return server_round % self.checkpoint.save_every == 0 or server_round == self.federation.rounds
