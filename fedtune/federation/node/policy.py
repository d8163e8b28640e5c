"""What a data owner decides, and what of the server's config is left of it: no path, no code, no version but the owner's.

The owner's decisions travel in the node's own config, which a server cannot write, to wherever its ClientApp runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Literal, NamedTuple

from pydantic import ValidationError

from fedtune.config.facts import value_at
from fedtune.config.schema import BUILTIN_TINY, DataConfig, FedTuneConfig, ModelConfig
from fedtune.errors import ClientError

ERRORS_PASS = "errors-pass"
"""Key of a node's config where who runs the client sees to its errors, as the engines of one machine do."""
NODE_KEY = "fedtune-node"
"""Key of a node's config that holds the owner's decisions, as JSON."""


NO_STATE = (
    "This run asks for local privacy, and this client has no folder of state in which to keep its privacy account."
)


class Term(NamedTuple):
    """One value of a run's config that an owner does not leave to the server."""

    key: str
    """Dotted path in the config."""
    how: Literal["only", "at most", "at least"]
    value: bool | int | float | str

    def holds(self, config: FedTuneConfig) -> bool:
        """Whether a run's config keeps to it."""
        value = value_at(config, self.key)
        if self.how == "only":
            return bool(value == self.value)
        return bool(value <= self.value if self.how == "at most" else value >= self.value)

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.key} {self.how} {self.value}"


_PRIVACY: Mapping[str, Literal["only", "at most", "at least"]] = {
    # A budget that is smaller, and noise that is larger, protect as well as what was agreed on.
    "privacy.epsilon": "at most",
    "privacy.delta": "at most",
    "privacy.noise_multiplier": "at least",
}


def privacy_terms(config: FedTuneConfig, named: Iterable[str]) -> tuple[Term, ...]:
    """Return what privacy an owner insists on: mode and budget, and what else of `privacy` is among the keys that they `named`.

    Clients keep the budget themselves, so the noise need not be named; mode `none` insists on nothing.
    """
    if config.privacy.mode == "none":
        return ()
    keys = dict.fromkeys(("privacy.mode", "privacy.epsilon", "privacy.delta"))
    keys |= dict.fromkeys(key for key in named if key.startswith("privacy."))
    return tuple(Term(key, _PRIVACY.get(key, "only"), value_at(config, key)) for key in keys)


@dataclass(frozen=True)
class NodeSettings:
    """What the owner of a node's data has decided."""

    data: str
    """Absolute path of the data file; all its rows are this node's share."""
    base: str
    """The base model: an absolute folder, a hub id, or `builtin:tiny`."""
    revision: str | None = None
    """The base model's only permitted commit, branch or tag; None leaves it to the run."""
    trust_remote_code: bool = False
    """Whether a run may ask for the base model's own code, at `revision`."""
    instruction: str | None = None
    """Template of the instruction in terms of this file's columns; None takes the run's."""
    response: str | None = None
    """Template of the response in terms of this file's columns; None takes the run's."""
    state: str | None = None
    """Absolute path of a folder in which the client keeps its privacy account, and what it needs between rounds. None: the node
    keeps that in memory while a run lasts, and takes no part in runs with local privacy."""
    max_seconds: float | None = None
    """The longest training that this node gives to one round; None takes the run's."""
    terms: tuple[Term, ...] = ()
    """What else a run's config must be for this node to take part."""

    def to_json(self) -> str:
        """Return the settings as `from_json` reads them."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeSettings:
        """Return the settings that `to_json` wrote."""
        table = json.loads(text)
        return cls(**{**table, "terms": tuple(Term(*term) for term in table["terms"])})

    @property
    def insists_on_local_privacy(self) -> bool:
        """Whether the owner takes part in no run without local privacy."""
        return any((term.key, term.value) == ("privacy.mode", "local") for term in self.terms)

    @property
    def model(self) -> ModelConfig:
        """The base model as far as the owner decides on it."""
        return ModelConfig(base=self.base, revision=self.revision, trust_remote_code=self.trust_remote_code)


def config_on_node(text: str, server_version: str, settings: NodeSettings) -> FedTuneConfig:
    """Return the run's config as it holds on a node.

    Whatever names a place or allows code is the owner's; the rest is the run's.

    Args:
        text: The run's config, as the JSON that travels.
        server_version: The server's version of fedtune, empty where it does not say.
        settings: What the owner decided.

    Raises:
        ClientError: another version of fedtune or another base model is asked for, the base model's code is to be run without
            leave, the config is none, or against the owner's terms. Its text holds nothing of the owner's.
    """
    ours = version("fedtune")
    if server_version and server_version != ours:
        raise ClientError(f"The run is of fedtune {server_version}, this node has {ours}.")
    try:
        config = FedTuneConfig.model_validate_json(text, strict=True)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ClientError(f"The run's config is none that fedtune {ours} accepts; see {where or 'its JSON'}.") from None
    if config.privacy.mode == "local" and settings.state is None:
        raise ClientError(NO_STATE)
    for term in settings.terms:
        if not term.holds(config):
            raise ClientError(
                f"The run's {term.key} is {value_at(config, term.key)}; this node takes part with {term}."
            )
    return config.model_copy(
        update={
            "model": _model(config.model, settings),
            # Made anew rather than copied: an option of the data that comes later is not the server's unless named here.
            "data": DataConfig(
                source=settings.data,
                instruction=settings.instruction or config.data.instruction,
                response=settings.response or config.data.response,
                reshuffle=config.data.reshuffle,
            ),
            "federation": config.federation.model_copy(
                update={
                    "client_timeout_s": min(config.federation.client_timeout_s, settings.max_seconds or float("inf"))
                }
            ),
        }
    )


def _model(asked: ModelConfig, settings: NodeSettings) -> ModelConfig:
    if _is_name(asked.base) and _is_name(settings.base) and asked.base != settings.base:
        raise ClientError(f"The run's base model is {asked.base}, which this node does not offer.")
    if settings.revision and asked.revision and asked.revision != settings.revision:
        raise ClientError(f"The run's base model is at revision {asked.revision}, which this node does not offer.")
    revision = settings.revision or asked.revision
    if asked.trust_remote_code and not (settings.trust_remote_code and revision == settings.revision):
        raise ClientError("The run asks for the base model's own code, which this node does not run.")
    return asked.model_copy(update={"base": settings.base, "revision": revision})


def _is_name(base: str) -> bool:
    """Whether a base model is named, built in or on the hub, rather than a folder's path."""
    return base == BUILTIN_TINY or not (base.startswith((".", "/", "~")) or base.count("/") > 1 or "\\" in base)


def error_text(error: BaseException) -> str:
    """Return what of an error may leave a node: a ClientError's text, or the bare name of another exception's class."""
    return str(error) if isinstance(error, ClientError) else type(error).__name__
