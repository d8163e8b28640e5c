"""Strategies that average the clients' adapters and take a step on the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fedtune.config.strategies.base import StrategyOptions, Values

if TYPE_CHECKING:
    from fedtune.config.schema import FedTuneConfig


class FedAvg(StrategyOptions):
    """Federated averaging (https://arxiv.org/abs/1602.05629)."""

    supports_privacy: ClassVar[bool] = True

    name: Literal["fedavg"] = "fedavg"
    """Average of the clients' adapters, weighted by their numbers of examples."""


class FedProx(StrategyOptions):
    """FedAvg with a proximal term on the client (https://arxiv.org/abs/1812.06127)."""

    supports_privacy: ClassVar[bool] = True

    name: Literal["fedprox"]
    """FedAvg whose clients are held near the global adapter."""
    proximal_mu: float = Field(0.01, ge=0)
    """Weight mu of the client's term mu/2 · ||w - w_global||²; 0 is FedAvg."""

    def order_values(self, config: FedTuneConfig, server_round: int) -> Values:
        """Send mu to the clients."""
        return {"proximal-mu": self.proximal_mu}


class FedAvgM(StrategyOptions):
    """FedAvg with momentum on the server (https://arxiv.org/abs/1909.06335)."""

    supports_privacy: ClassVar[bool] = True

    name: Literal["fedavgm"]
    """The server keeps a running direction of the rounds' updates."""
    server_learning_rate: float = Field(0.5, gt=0)
    """Step along the momentum; 1 - `server_momentum` moves as far as FedAvg in the long run."""
    server_momentum: float = Field(0.5, ge=0, lt=1)
    """Share of the former direction that is kept; 0, with a learning rate of 1, is FedAvg."""


class _Moments(StrategyOptions):
    """Options of the strategies that keep two moments of the rounds' updates."""

    supports_privacy: ClassVar[bool] = True

    eta: float | None = Field(None, gt=0)
    """Server learning rate; None is a tenth of the most that a client moves a value: learning_rate_max · max_steps."""
    beta_1: float = Field(0.5, ge=0, lt=1)
    """Decay of the first moment; the usual 0.9 remembers ten rounds, too many where a run has few."""
    beta_2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment."""
    tau: float | None = Field(None, gt=0)
    """Adaptivity: added to the root of the second moment; None is a tenth of eta."""


class FedAdam(_Moments):
    """Adam on the server (https://arxiv.org/abs/2003.00295)."""

    name: Literal["fedadam"]
    """The round's average update is a gradient for Adam."""


class FedYogi(_Moments):
    """Yogi on the server (https://arxiv.org/abs/2003.00295)."""

    name: Literal["fedyogi"]
    """As FedAdam, with a second moment that grows no faster than it must."""


class FedAdagrad(StrategyOptions):
    """Adagrad on the server (https://arxiv.org/abs/2003.00295)."""

    supports_privacy: ClassVar[bool] = True

    name: Literal["fedadagrad"]
    """The round's average update is a gradient for Adagrad."""
    eta: float | None = Field(None, gt=0)
    """Server learning rate; None is half of the most that a client moves a value: learning_rate_max · max_steps."""
    tau: float | None = Field(None, gt=0)
    """Adaptivity: added to the root of the sum of squares; None is a tenth of eta."""
