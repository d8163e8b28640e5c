"""The ClientApp: says how many rows it has, and trains the adapter that it is sent on them.

What leaves a client is the adapter and named numbers. An error leaves as the text of a ClientError, which holds no data and
no paths, or as the bare name of the exception's class.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config.schema import FedTuneConfig
from fedtune.config.strategies.base import Shapes
from fedtune.config.strategies.base_delta import DELTA
from fedtune.data.order import steps_of_round
from fedtune.errors import ClientError, FedTuneError
from fedtune.federation.account import ACCOUNT_OF_RUN, AccountBook, refusing
from fedtune.federation.client_state import ClientState, state_of_node
from fedtune.federation.events import StepDone, tell
from fedtune.federation.flower.compat import ErrorCode
from fedtune.federation.node.policy import ERRORS_PASS, NO_STATE, NODE_KEY, error_text
from fedtune.federation.privacy import noisy_average
from fedtune.federation.strategies import client_part
from fedtune.federation.workspace import NodeWorkspace, Workspace, workspace_of_client
from fedtune.models.adapter import AdaptedModel, AdapterTensors, initial_tensors
from fedtune.protocol.arrays import decode, encode
from fedtune.protocol.messages import ARRAYS, CONFIG, METRICS, ClientDescription, TrainOrder, TrainReply, WireError
from fedtune.protocol.wire_format import CODECS
from fedtune.runs.directory import RunDirectory, find_flower_run
from fedtune.runs.log import LOG_NAME, run_log
from fedtune.training.local import StepReport, train_locally

app = ClientApp()
log = logging.getLogger(__name__)

RESIDUAL = "owed."
"""Prefix of the rounding errors that a client adds to its next reply."""


Handler = Callable[[Message, Context], Message]


def discreet(handler: Handler) -> Handler:
    """Let no exception's text leave a client, which Flower would send to the server as it is.

    A data owner's node, and the engines of one machine, see to that themselves.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        with _log_of(context):
            try:
                return handler(message, context)
            except Exception as error:
                if {NODE_KEY, ERRORS_PASS} & context.node_config.keys():
                    raise
                log.debug("Client %s failed.", context.node_config.get("partition-id"), exc_info=True)
                reason = error_text(error)
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    return answer


def _log_of(context: Context) -> AbstractContextManager[object]:
    """Return the run's log where the run directory is on this machine; a data owner's node has a log of its own."""
    if NODE_KEY in context.node_config:
        return nullcontext()
    run = str(context.run_config.get("run-dir", ""))
    folder = Path(run) if run else find_flower_run(context.run_id)
    return nullcontext() if folder is None else run_log(folder / LOG_NAME)


@app.query()
@discreet
def describe(message: Message, context: Context) -> Message:
    """Reply with the client's partition id and its number of rows."""
    partition = int(context.node_config["partition-id"])
    workspace = workspace_of_client(context)
    # Under local privacy a number of rows is data like any other; every client weighs 1.
    rows = 1 if workspace.config.privacy.mode == "local" else len(workspace.rows(partition))
    return Message(RecordDict({METRICS: ClientDescription(partition, rows).to_record()}), reply_to=message)


@app.train()
@discreet
def train(message: Message, context: Context) -> Message:
    """Train the adapter in the message for one round and reply with what of it travels."""
    partition = int(context.node_config["partition-id"])
    workspace = workspace_of_client(context)
    config, adapted, rows = workspace.config, workspace.adapted, workspace.rows(partition)
    order = _order(message)
    server_round = order.server_round

    account = _account_of(context, workspace, partition)
    if account is not None:
        book, name = account
        with refusing():
            book.check(name, config.privacy, server_round)
    state = ClientState(context, partition)
    kept = state.before(server_round)
    received = _received(message, config, adapted.shapes, order, partition)
    start = _start(received, adapted, config, server_round)
    part = client_part(config, received, kept)
    adapted.load(start)
    steps = steps_of_round(
        len(rows),
        config.training,
        seed=config.seed,
        partition=partition,
        server_round=server_round,
        reshuffle=config.data.reshuffle,
    )

    def on_step(report: StepReport) -> None:
        tell(StepDone(partition, report.step, len(steps), report.loss, report.tokens, report.seconds))

    adapted.set_base_delta({name: tensor for name, tensor in received.items() if DELTA in name})
    try:
        result = train_locally(
            adapted,
            rows,
            steps,
            config.training,
            learning_rate=order.learning_rate,
            seed=(config.seed, server_round, partition),
            proximal_mu=order.proximal_mu,
            trained={name for name in adapted.shapes if config.strategy.is_trained(name, server_round)},
            adjust=part,
            gradient_checkpointing=config.model.gradient_checkpointing,
            on_step=on_step,
            timeout_s=config.federation.client_timeout_s,
        )
    finally:
        adapted.set_base_delta({})
    try:
        adapted.check_base(f"after client {partition} trained")
    except FedTuneError as error:
        raise ClientError(error.message) from error
    report = TrainReply(
        server_round,
        examples=len(rows),
        loss=sum(result.losses) / len(result.losses),
        losses=result.losses,
        rows=result.rows,
        tokens=result.tokens,
        response_tokens=result.response_tokens,
        seconds=result.seconds,
    )
    outcome = adapted.tensors()
    if part is not None:
        outcome |= part.changes()
        kept |= part.kept()
    if account is not None:
        outcome = _privatised(outcome, start, config, server_round, adapted.shapes, partition, account)
        report = TrainReply(server_round, examples=1)  # what is computed from the data and has no noise stays here
    reply, residuals = _reply(
        outcome, start, config, config.strategy.up_shapes(config, adapted.shapes, server_round, partition), kept
    )
    if kept | residuals:
        state.keep(server_round, kept | residuals)
    return Message(RecordDict({ARRAYS: reply, METRICS: report.to_record()}), reply_to=message)


def _order(message: Message) -> TrainOrder:
    try:
        return TrainOrder.from_record(message.content.get(CONFIG))
    except WireError as error:
        raise ClientError(f"The server's message cannot be read: {error}.") from error


def _received(
    message: Message, config: FedTuneConfig, shapes: Shapes, order: TrainOrder, partition: int
) -> AdapterTensors:
    """Return the message's tensors.

    Raises:
        ClientError: they are not those that the config says.
    """
    expected = config.strategy.down_shapes(config, shapes, order.server_round, partition, order.delta_rank)
    arrays = message.content.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord):
        raise ClientError(f"The server's message cannot be read: it lacks its {ARRAYS!r} record.")
    try:
        return decode(arrays, expected, config.down_format)
    except WireError as error:
        raise ClientError(f"The server's message cannot be read: {error}.") from error


def _start(received: AdapterTensors, adapted: AdaptedModel, config: FedTuneConfig, server_round: int) -> AdapterTensors:
    """Return the whole adapter that training starts from.

    What did not travel follows from the seed; an adapter of a lower rank is filled up with zeros, whose gradients are zero.
    """
    missing = [name for name in adapted.shapes if name not in received]
    fresh = config.strategy.fresh_adapter
    own = initial_tensors(adapted, config.seed, server_round if fresh else 0) if missing else {}
    return {
        name: _filled(received[name], shape) if name in received else own[name]
        for name, shape in adapted.shapes.items()
    }


def _account_of(context: Context, workspace: Workspace, partition: int) -> tuple[AccountBook, str] | None:
    """Return the book and the name of the account that a release goes on; None without local privacy.

    Raises:
        ClientError: there is no place for one, or it cannot be read.
    """
    if workspace.config.privacy.mode != "local":
        return None
    state, run = state_of_node(context), str(context.run_config.get("run-dir", ""))
    if isinstance(workspace, NodeWorkspace) and state is not None:
        place, name = state, workspace.fingerprint(partition)
    elif run and NODE_KEY not in context.node_config:
        place, name = RunDirectory(Path(run)).client_state(partition), ACCOUNT_OF_RUN
    else:
        raise ClientError(NO_STATE)
    book = AccountBook(place)
    with refusing():
        book.open()
    return book, name


def _privatised(
    outcome: AdapterTensors,
    start: AdapterTensors,
    config: FedTuneConfig,
    server_round: int,
    shapes: Shapes,
    partition: int,
    account: tuple[AccountBook, str],
) -> AdapterTensors:
    """Return the adapter that a client lets out under local privacy, clipped and noisy; it is on the account by then.

    A repeated round gets the noise of the account's one key: another key would be another release of the same update.

    Raises:
        ClientError: the client has spent its privacy budget, or its account cannot be read. The server's own count is not
            relied on.
    """
    book, name = account
    sent = {name: start[name] for name in config.strategy.up_shapes(config, shapes, server_round, partition)}
    with refusing():
        private = noisy_average(
            sent,
            {partition: {name: outcome[name] for name in sent}},
            config.privacy,
            asked=1,
            key=book.key(name),
            server_round=server_round,
        )
        book.release(name, private, config.privacy, server_round)
    return {**outcome, **private}


def _filled(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    filled = torch.zeros(shape)
    filled[tuple(slice(size) for size in tensor.shape)] = tensor
    return filled


def _reply(
    outcome: AdapterTensors, start: AdapterTensors, config: FedTuneConfig, shapes: Shapes, kept: AdapterTensors
) -> tuple[ArrayRecord, AdapterTensors]:
    """Return the reply's arrays, and the rounding errors that the next reply adds.

    A packed reply holds differences from `start`, to which the error of the client's last reply is added: the next
    round makes up for what one round loses (error feedback, https://arxiv.org/abs/1809.07599).
    """
    sent = {name: outcome[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}
    form = config.up_format
    if form not in CODECS:
        return encode(sent, form), {}
    for name, tensor in sent.items():
        if name in start:
            tensor = tensor - start[name][tuple(slice(size) for size in tensor.shape)]
        residual = kept.get(RESIDUAL + name)
        sent[name] = tensor if residual is None or residual.shape != tensor.shape else tensor + residual
    record = encode(sent, form)
    read = decode(record, shapes, form)
    return record, {RESIDUAL + name: tensor - read[name] for name, tensor in sent.items()}
