"""The one typed config that all four subcommands share.

Validation accepts or refuses and never rewrites: a config holds what the user wrote, and whatever follows from it is a
property. Every field's meaning stands under it; the reference in docs/reference/config.md is generated from these texts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedtune.config.base import Key, Section
from fedtune.config.strategies import STRATEGIES, StrategyConfig
from fedtune.config.strategies.averages import FedAvg

BUILTIN_TINY = "builtin:tiny"

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Switch = Literal["auto", "on", "off"]
Codec = Literal["none", "bf16", "int8", "int4"]


class ModelConfig(Section):
    """The base model: which, and how it is held in memory."""

    base: Annotated[str, Key(publishable="name", in_card=True)] = Field("mistralai/Mistral-7B-v0.3", min_length=1)
    """A hub id, a local folder, or `builtin:tiny` (ships with fedtune)."""
    revision: Annotated[str | None, Key(in_card=True)] = None
    """Branch, tag or commit on the hub; the commit actually used is recorded in the run."""
    quantization: Annotated[Literal["nf4", "fp4", "int8", "none"], Key(in_card=True)] = "nf4"
    """How the base's linear weights are stored. The leaderboard's 4-bit is `fp4` (protocol, section 4)."""
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of forward and backward; `auto` is bf16 on a GPU that has it, fp32 elsewhere."""
    dequantize: Switch = "auto"
    """Keep 4-bit weights dequantized in memory: same values, no dequantization in every pass; `auto` where memory allows."""
    gradient_checkpointing: Annotated[Switch, Key(resumable=True)] = "auto"
    """Recompute activations in the backward pass to save memory; `auto` turns it on where memory is short."""
    trust_remote_code: bool = False
    """Run the model's own Python code; of a model on the hub only with a full commit hash as `model.revision`."""

    @property
    def is_folder(self) -> bool:
        """Whether `base` is a folder rather than built in or a model on the hub."""
        return self.base.startswith((".", "/", "~")) or self.base.count("/") > 1 or Path(self.base).is_dir()

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> Self:
        pinned = re.fullmatch(r"[0-9a-f]{40}", self.revision or "")
        if self.trust_remote_code and not pinned and not self.is_folder:
            raise ValueError("trust_remote_code needs model.revision to be a commit hash of 40 hex digits")
        if self.dequantize == "on" and self.quantization in ("int8", "none"):
            raise ValueError(
                f"dequantize = on needs 4-bit weights (nf4 or fp4), not {self.quantization}: "
                "int8 also quantizes activations, so its results would change"
            )
        return self


class AdapterConfig(Section):
    """The LoRA adapter (https://arxiv.org/abs/2106.09685)."""

    rank: Annotated[PositiveInt, Key(in_card=True)] = 32
    """Rank r of the update B·A."""
    alpha: Annotated[PositiveInt, Key(in_card=True)] = 64
    """The update is scaled by alpha / rank (by alpha / sqrt(rank) with rsLoRA)."""
    dropout: Annotated[float, Key(in_card=True)] = Field(0.075, ge=0, lt=1)
    """Dropout on the adapter's input while training; linear layers only, PEFT has none for stacked experts."""
    targets: Annotated[Literal["default", "all-linear"] | tuple[str, ...], Key(in_card=True)] = "default"
    """Names of linear modules, embeddings or stacked experts' parameters; `all-linear`; or PEFT's default for the architecture,
    the attention projections where it has none. Modules that training on text does not reach, such as a vision tower's, get no
    adapter unless they are named in full."""
    rslora: Annotated[bool, Key(in_card=True)] = False
    """Rank-stabilised scaling (https://arxiv.org/abs/2312.03732)."""
    dora: Annotated[bool, Key(in_card=True)] = False
    """Weight-decomposed adapter (https://arxiv.org/abs/2402.09353)."""
    modules_to_save: Annotated[tuple[str, ...], Key(in_card=True)] = ()
    """Modules that are trained whole beside the adapter, such as `lm_head`; their weights travel in every message. One that
    the base ties to another (`lm_head` to `embed_tokens`) is trained apart from it."""

    @property
    def scale(self) -> float:
        """What the product B·A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

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

    source: Annotated[str | None, Key(publishable="name", in_card=True)] = None
    """A hub id, `builtin:tiny`, a JSONL, JSON, CSV or Parquet file, or a folder with one such file per client."""
    revision: Annotated[str | None, Key(in_card=True)] = None
    """Branch, tag or commit on the hub."""
    split: Annotated[str, Key()] = Field("train", min_length=1)
    """Split of a hub data set."""
    instruction: Annotated[str, Key()] = Field("{instruction}", min_length=1)
    """Template of the instruction; `{name}` stands for a column."""
    response: Annotated[str, Key()] = Field("{output}", min_length=1)
    """Template of the response, the only text that the loss is computed on."""
    partitioner: Annotated[Literal["iid", "dirichlet", "natural", "files"], Key(in_card=True)] = "iid"
    """Equal random shares; label-skewed shares; one client per value of a column; one client per file."""
    partition_by: Annotated[str | None, Key()] = None
    """The column that `dirichlet` and `natural` partition by; also the label of the skew in the partition table."""
    alpha: float = Field(0.5, gt=0)
    """Concentration of `dirichlet`: small is skewed, large is even."""
    reshuffle: Annotated[bool, Key(in_card=True)] = True
    """A fresh order of each client's rows in every round; false repeats one order, as the leaderboard's template does."""

    @model_validator(mode="after")
    def _column_is_named(self) -> Self:
        if self.partitioner in ("dirichlet", "natural") and not self.partition_by:
            raise ValueError(f"partitioner = {self.partitioner} needs data.partition_by, the column to partition by")
        return self


class TrainingConfig(Section):
    """What one client does in one round."""

    batch_size: Annotated[PositiveInt, Key(in_card=True)] = 16
    """Rows in a micro-batch."""
    accumulation: Annotated[PositiveInt, Key(in_card=True)] = 1
    """Micro-batches in an optimiser step."""
    max_steps: Annotated[PositiveInt, Key(in_card=True)] = 10
    """At most so many optimiser steps a round; whichever of this and `epochs` ends first."""
    epochs: Annotated[PositiveInt, Key(in_card=True)] = 3
    """At most so many passes over the client's rows a round."""
    learning_rate_max: Annotated[float, Key(in_card=True)] = Field(5e-5, gt=0)
    """Learning rate at the start of the run; it falls by a cosine over the rounds and is constant inside a round."""
    learning_rate_min: Annotated[float, Key(in_card=True)] = Field(1e-6, ge=0)
    """Learning rate in the last round."""
    sequence_length: Annotated[int, Key(in_card=True)] = Field(512, ge=8)
    """Longest row in tokens; longer rows are cut at the end."""
    optimizer: Annotated[Literal["adamw", "adamw_8bit", "paged_adamw_8bit"], Key(in_card=True)] = "adamw"
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

    clients: Annotated[PositiveInt, Key(in_card=True)] = 20
    """Number of clients, which is the number of partitions of the data."""
    fraction: Fraction = 0.1
    """Share of the clients that train in a round."""
    rounds: Annotated[PositiveInt, Key(in_card=True)] = 200
    """Number of rounds."""
    min_success: Annotated[PositiveInt | None, Key(resumable=True)] = None
    """A round with fewer accepted replies ends the run. Without a number one reply is enough, but a client that fails in the same
    way in two rounds ends the run as well; with a number the run goes on without such clients. A node that is gone counts as
    absent, not as failed."""
    client_timeout_s: Annotated[float, Key(resumable=True)] = Field(3600.0, gt=0)
    """A client that has not replied after so many seconds is counted as failed."""
    max_examples: PositiveInt = 1_000_000
    """The most examples that any client may claim, whatever it announces."""
    engine: Annotated[Literal["in-process", "ray", "superlink"], Key(resumable=True)] = "in-process"
    """Where the clients run: one after another in this process, at the same time in Ray actors, or on a SuperLink's nodes."""
    client_cpus: Annotated[PositiveInt | None, Key(resumable=True)] = None
    """CPU cores of one client on the engine `ray`; None divides the cores of the machine or cluster evenly."""
    client_gpus: Annotated[float | None, Key(resumable=True)] = Field(None, ge=0, le=1)
    """The part of a GPU that one client gets on the engine `ray`; None is a whole one where there is one."""
    ray_address: Annotated[str, Key(resumable=True, publishable="never")] = ""
    """The Ray cluster that the engine `ray` uses: `host:port` of its head node. Empty starts a private Ray on this machine."""
    superlink: Annotated[str | None, Key(resumable=True, publishable="never")] = Field(None, min_length=1)
    """The SuperLink that `engine = superlink` submits to: `host:port`, or the name of a connection in your Flower config."""
    superlink_ca: Annotated[str | None, Key(resumable=True, publishable="never")] = Field(None, min_length=1)
    """File with the certificate that signed the SuperLink's; without it the system's certificates are taken."""
    superlink_insecure: Annotated[bool, Key(resumable=True)] = False
    """Talk to a SuperLink on another machine without encryption; on this machine that goes without saying."""

    @field_validator("ray_address")
    @classmethod
    def _address_has_a_port(cls, value: str) -> str:
        if value and not re.fullmatch(r"[^\s/]+:[0-9]+", value):
            raise ValueError(f"{value} is not host:port, such as 10.0.0.5:6379")
        return value

    @model_validator(mode="after")
    def _success_is_reachable(self) -> Self:
        if self.required_replies > self.clients_per_round:
            raise ValueError(
                f"min_success ({self.min_success}) is above the {self.clients_per_round} clients that train in a round"
            )
        return self

    @property
    def required_replies(self) -> int:
        """Accepted replies that a round needs."""
        return self.min_success or 1

    @property
    def clients_per_round(self) -> int:
        """Clients that train in a round: the fraction rounded down, at least one."""
        return max(1, int(self.clients * self.fraction + 1e-9))


class CommunicationConfig(Section):
    """What travels, and how much of it may."""

    wire_dtype: Annotated[Literal["float32", "bf16", "fp16"], Key(in_card=True)] = "float32"
    """Number format of adapters in messages; averaging is always in float32."""
    codec: Annotated[Codec, Key(in_card=True)] = "none"
    """Compression of adapters in messages, both ways: `none` sends each array in `wire_dtype` (over a SuperLink all as one string
    of the same values); the others send one block-wise quantized string of bytes, replies as differences whose rounding errors
    the client keeps for its next reply."""
    uplink_codec: Annotated[Codec | None, Key(in_card=True)] = None
    """The codec of replies, where it is another."""
    downlink_codec: Annotated[Codec | None, Key(in_card=True)] = None
    """The codec of messages to clients, where it is another."""
    cap_mib: Annotated[float, Key(resumable=True)] = Field(200_000.0, gt=0)
    """Most MiB of training messages, both ways; the run stops before the message that would pass it."""


class PrivacyConfig(Section):
    """Client-level differential privacy of the adapter; see the concept page on what it protects and what not."""

    mode: Literal["none", "central", "local"] = "none"
    """`central`: the server clips every client's update and adds noise to their average; `local`: each client does so itself,
    before anything leaves it."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of a client's update, over the whole adapter; a longer one is scaled down to it."""
    noise_multiplier: float = Field(1.0, gt=0)
    """Standard deviation of the noise in units of `clip`: on the sum of a round's updates (central) or on each (local)."""
    epsilon: Annotated[float, Key(resumable=True)] = Field(8.0, gt=0)
    """The budget: the run stops before a round that would pass it."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Probability with which the bound may fail; well below 1 / clients."""


class CheckpointConfig(Section):
    """Which adapters are kept."""

    save_every: Annotated[PositiveInt, Key(resumable=True)] = 5
    """`peft_<round>` is written after every so many rounds and after the last."""


class FedTuneConfig(Section):
    """Everything that decides a run."""

    challenge: Annotated[str | None, Key()] = None
    """The challenge whose values this config started from."""
    recipe: Annotated[str | None, Key()] = None
    """The recipe whose values this config started from."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    strategy: StrategyConfig = FedAvg()
    communication: CommunicationConfig = CommunicationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: Annotated[int, Key(in_card=True)] = Field(42, ge=0, lt=2**32)
    """Seed of everything random: partitions, sampling, initialisation, order of rows, dropout."""

    @model_validator(mode="after")
    def _strategy_fits(self) -> Self:
        """What a strategy cannot be combined with; one sentence each, with the keys in question."""
        name, asked = self.strategy.name, self.federation.clients_per_round
        if self.strategy.averages_products and self.adapter.dora:
            raise ValueError(f"strategy.name = {name} averages products BA and does not go with adapter.dora")
        if problem := self.strategy.problem(self):
            raise ValueError(problem)
        if asked < (needed := self.strategy.replies_needed):
            raise ValueError(f"strategy.name = {name} needs {needed} clients a round, and {asked} are asked")
        if self.privacy.mode != "none" and not self.strategy.supports_privacy:
            private = [other for other, options in STRATEGIES.items() if options.supports_privacy]
            raise ValueError(
                f"privacy.mode = {self.privacy.mode} goes with {', '.join(private)}, not with {name}: "
                "its bound rests on an average of clipped updates"
            )
        return self

    @property
    def down_format(self) -> str:
        """How messages to clients are written: in a codec, in the wire dtype, or `joined`."""
        return self._format(self.communication.downlink_codec)

    @property
    def up_format(self) -> str:
        """How replies are written."""
        return self._format(self.communication.uplink_codec)

    def _format(self, codec: Codec | None) -> str:
        codec, wire = codec or self.communication.codec, self.communication.wire_dtype
        if codec != "none":
            return f"packed-{codec}"
        # Over a SuperLink every array costs calls of its own, each way twice: there all of a message's travel as one.
        return f"joined-{wire}" if self.federation.engine == "superlink" else wire

    def is_checkpoint(self, server_round: int) -> bool:
        """Whether `peft_<server_round>` is kept (rounds count from 1)."""
        return server_round % self.checkpoint.save_every == 0 or server_round == self.federation.rounds
