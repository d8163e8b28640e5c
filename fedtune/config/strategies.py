"""The options of every strategy: a union told apart by `name`, one class an algorithm.

The algorithms themselves are in `fedtune/federation/strategies/`, one file each, named after it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtune.config.section import Section


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


class FedAvgM(Section):
    """FedAvg with momentum on the server (https://arxiv.org/abs/1909.06335)."""

    name: Literal["fedavgm"]
    """The server keeps a running direction of the rounds' updates."""
    server_learning_rate: float = Field(0.5, gt=0)
    """Step along the momentum; 1 - `server_momentum` moves as far as FedAvg in the long run."""
    server_momentum: float = Field(0.5, ge=0, lt=1)
    """Share of the former direction that is kept; 0, with a learning rate of 1, is FedAvg."""


class FedAdam(Section):
    """Adam on the server (https://arxiv.org/abs/2003.00295)."""

    name: Literal["fedadam"]
    """The round's average update is a gradient for Adam."""
    eta: float | None = Field(None, gt=0)
    """Server learning rate; None is a tenth of the most that a client moves a value: learning_rate_max · max_steps."""
    beta_1: float = Field(0.5, ge=0, lt=1)
    """Decay of the first moment; the usual 0.9 remembers ten rounds, too many where a run has few."""
    beta_2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment."""
    tau: float | None = Field(None, gt=0)
    """Adaptivity: added to the root of the second moment; None is a tenth of eta."""


class FedYogi(Section):
    """Yogi on the server (https://arxiv.org/abs/2003.00295)."""

    name: Literal["fedyogi"]
    """As FedAdam, with a second moment that grows no faster than it must."""
    eta: float | None = Field(None, gt=0)
    """Server learning rate; None is a tenth of the most that a client moves a value: learning_rate_max · max_steps."""
    beta_1: float = Field(0.5, ge=0, lt=1)
    """Decay of the first moment; the usual 0.9 remembers ten rounds, too many where a run has few."""
    beta_2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment."""
    tau: float | None = Field(None, gt=0)
    """Adaptivity: added to the root of the second moment; None is a tenth of eta."""


class FedAdagrad(Section):
    """Adagrad on the server (https://arxiv.org/abs/2003.00295)."""

    name: Literal["fedadagrad"]
    """The round's average update is a gradient for Adagrad."""
    eta: float | None = Field(None, gt=0)
    """Server learning rate; None is half of the most that a client moves a value: learning_rate_max · max_steps."""
    tau: float | None = Field(None, gt=0)
    """Adaptivity: added to the root of the sum of squares; None is a tenth of eta."""


class FedMedian(Section):
    """The median of the clients' adapters, value by value (https://arxiv.org/abs/1803.01498)."""

    name: Literal["fedmedian"]
    """Withstands just under half of the clients of a round, three of which must reply; ignores numbers of examples."""


class FedTrimmedAvg(Section):
    """The mean without each value's extremes (https://arxiv.org/abs/1803.01498)."""

    name: Literal["fedtrimmedavg"]
    """Drops the largest and the smallest of each value, then averages; ignores numbers of examples."""
    beta: float = Field(0.2, ge=0.001, lt=0.5)
    """Share of a round's replies that is cut off at each end, rounded down; too few replies to cut one fail the round."""


class Krum(Section):
    """The one adapter nearest to its neighbours (https://arxiv.org/abs/1703.02757)."""

    name: Literal["krum"]
    """Takes a single client's adapter each round; 2 · malicious + 3 clients must reply."""
    malicious: int = Field(1, ge=0)
    """Clients a round that may be hostile."""


class MultiKrum(Section):
    """The average of the adapters nearest to their neighbours (https://arxiv.org/abs/1703.02757)."""

    name: Literal["multikrum"]
    """As Krum, averaging several; ignores numbers of examples."""
    malicious: int = Field(1, ge=0)
    """Clients a round that may be hostile."""
    selected: int | None = Field(None, ge=1)
    """Clients whose adapters are averaged; None is as many as a score has neighbours: the replies less `malicious` and 2."""


class Bulyan(Section):
    """Krum, then a trimmed mean (https://arxiv.org/abs/1802.07927)."""

    name: Literal["bulyan"]
    """4 · malicious + 3 clients must reply; ignores numbers of examples."""
    malicious: int = Field(1, ge=0)
    """Clients a round that may be hostile."""


class FFALoRA(Section):
    """LoRA with A frozen at its initial values (https://arxiv.org/abs/2403.12313)."""

    name: Literal["ffa-lora"]
    """Only B is trained and sent: less than half the bytes where queries are grouped, and averaging B is averaging BA."""


class RoLoRA(Section):
    """LoRA that trains B and A in turn (https://arxiv.org/abs/2502.01755)."""

    name: Literal["rolora"]
    """B in odd rounds, A in even ones; what is not trained is not sent back."""


class FlexLoRA(Section):
    """The clients' products BA are averaged and split again by SVD (https://arxiv.org/abs/2402.11505)."""

    name: Literal["flexlora"]
    """Clients may have different ranks; averaging is of BA, not of B and A apart."""
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Ranks of clients 0, 1, …, from the start again after the last; empty: `adapter.rank` for all. None is larger than that."""


class FLoRA(Section):
    """The clients' adapters are stacked, which is exact, and added to the base (https://arxiv.org/abs/2409.05976)."""

    name: Literal["flora"]
    """Each round starts a fresh adapter on a base that holds all former ones; messages to clients grow with the rounds."""


class FedExLoRA(Section):
    """FedAvg, and what it misses of the average of BA is added to the base (https://arxiv.org/abs/2410.09432)."""

    name: Literal["fedex-lora"]
    """The exact average; messages to clients grow with the rounds."""


class Scaffold(Section):
    """Control variates against client drift (https://arxiv.org/abs/1910.06378)."""

    name: Literal["scaffold"]
    """Each client corrects its gradients by how it has differed from the others; twice the bytes."""
    server_learning_rate: float = Field(1.0, gt=0)
    """Step along the clients' average update."""


StrategyOptions = (
    FedAvg
    | FedProx
    | FedAvgM
    | FedAdam
    | FedYogi
    | FedAdagrad
    | FedMedian
    | FedTrimmedAvg
    | Krum
    | MultiKrum
    | Bulyan
    | FFALoRA
    | RoLoRA
    | FlexLoRA
    | FLoRA
    | FedExLoRA
    | Scaffold
)
StrategyConfig = Annotated[StrategyOptions, Field(discriminator="name")]


def replies_needed(strategy: StrategyOptions) -> int:
    """Return the fewest replies of a round that `strategy` can keep its promise with; 1 for those that withstand nobody."""
    match strategy:
        case FedMedian():
            return 3
        case FedTrimmedAvg(beta=beta):
            replies = int(1 / beta)
            while not int(beta * replies):  # as the strategy itself counts whom it cuts off
                replies += 1
            return replies
        case Krum(malicious=hostile):
            return 2 * hostile + 3
        case MultiKrum(malicious=hostile, selected=selected):
            return max(2 * hostile + 3, hostile + (selected or 0))
        case Bulyan(malicious=hostile):
            return 4 * hostile + 3
    return 1


PRODUCT_STRATEGIES = ("flexlora", "flora", "fedex-lora")
"""Those that take an adapter for the product BA: DoRA, whose update is another function of it, does not go with them."""
