"""`fedtune node`: take part in a federation with data that stays here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli import options
from fedtune.cli.console import guarded, note, print_data, warn
from fedtune.errors import ConfigError, MissingError, UsageError

if TYPE_CHECKING:
    from fedtune.federation.node.policy import NodeSettings, Term


@guarded
def node(
    superlink: Annotated[
        str, typer.Option("--superlink", metavar="HOST:PORT", help="Where the coordinator's SuperLink listens.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data", parser=options.path, metavar="FILE", help="Your data: a JSONL, JSON, CSV or Parquet file."
        ),
    ],
    partition: Annotated[
        int, typer.Option("--partition", metavar="N", min=0, help="Your number in the federation, from 0.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            parser=options.path_or_name,
            metavar="BASE",
            help="The base model: a hub id, a folder or builtin:tiny.",
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", parser=options.path, metavar="FILE", help="The certificate that signed the SuperLink's."),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key", parser=options.path, metavar="FILE", help="The private key that the coordinator knows you by."
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Speak without TLS; for trials on one machine.")] = False,
    challenge: options.Challenge = None,
    recipe: options.Recipe = None,
    config: options.Config = None,
    set_: options.Set = None,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", metavar="S", min=1, help="Train no longer than this in a round.")
    ] = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option(
            "--at-most",
            metavar="KEY.PATH=NUMBER",
            help="Refuse runs in which this is more, such as training.batch_size=8; may be repeated.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            parser=options.path,
            metavar="DIR",
            help="A folder for your privacy account, the node's log, and what is carried on from round to round; "
            "local privacy needs it.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what was found, and stop.")] = False,
    debug: options.Debug = False,
) -> None:
    """Take part in a federation with data that stays on this machine.

    Example: fedtune node --superlink fed.example.org:8000 --ca ca.crt --key node-key --partition 0 --data mine.jsonl
    --model meta-llama/Llama-3.2-1B
    """
    if insecure and (ca or key):
        raise UsageError("--insecure means no TLS, which --ca and --key need.", hint="Leave --insecure out.")
    settings = _settings(data, model, challenge, recipe, config, set_, state, max_seconds, at_most)
    if settings.insists_on_local_privacy and settings.state is None:
        raise UsageError(
            "privacy.mode = local needs a folder that keeps count of what this node has released.",
            hint="Name one that is used for nothing else: --state DIR",
        )
    facts = _check(settings, superlink, ca, key, insecure)
    if dry_run:
        print_data("".join(f"{line}\n" for line in [*facts, "nothing was started"]))
        return
    for line in [*facts, f"answering {superlink} as client {partition}; end with Ctrl-C"]:
        note(line)

    from fedtune.federation.node.run import run_node

    try:
        run_node(settings, superlink=superlink, partition=partition, ca=ca, key=key, insecure=insecure)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("The node has left the federation; the same command joins it again.") from None


def _settings(
    data: Path,
    model: str | None,
    challenge: str | None,
    recipe: str | None,
    config: list[Path] | None,
    settings: list[str] | None,
    state: Path | None,
    max_seconds: float | None,
    at_most: list[str] | None,
) -> NodeSettings:
    """Return what the owner decided; templates, base model and privacy where a flag, a preset or a file names them."""
    from fedtune.config.load import load_config
    from fedtune.federation.node.policy import NodeSettings, privacy_terms
    from fedtune.runs.directory import expanded

    resolved = load_config(
        challenge=challenge,
        recipe=recipe,
        files=config or [],
        settings=settings or [],
        flags={"model.base": ("--model", model)} if model is not None else {},
    )
    preset = bool(challenge or recipe or config)
    if not preset and "model.base" not in resolved.named and model is None:
        raise UsageError(
            "No base model is named, and a node loads none that its owner did not name.",
            hint="Name it: --model BASE, or take the coordinator's --challenge, --recipe or --config.",
        )
    chosen, base = resolved.config.data, resolved.config.model.base
    private = sorted(key for key in resolved.named if key.startswith("privacy."))
    if private and resolved.config.privacy.mode == "none" and "privacy.mode" not in private:
        raise UsageError(
            f"{private[0]} asks for no privacy as long as privacy.mode is none.",
            hint="Say which: --set privacy.mode=local, or central where you trust the server.",
        )
    if state is not None and state.exists() and not state.is_dir():
        raise UsageError(f"--state {state} is a file.", hint="Name a folder: --state DIR")
    folder = expanded(Path(base))
    return NodeSettings(
        data=str(data.absolute()),
        base=str(folder.absolute()) if folder.is_dir() else base,
        revision=resolved.config.model.revision,
        trust_remote_code=resolved.config.model.trust_remote_code,
        instruction=chosen.instruction if preset or "data.instruction" in resolved.named else None,
        response=chosen.response if preset or "data.response" in resolved.named else None,
        state=str(state.absolute()) if state else None,
        max_seconds=max_seconds,
        terms=(*privacy_terms(resolved.config, private), *_limits(at_most or [])),
    )


def _limits(at_most: list[str]) -> list[Term]:
    """Return the terms of `--at-most`."""
    from fedtune.config.facts import table_value, value_at
    from fedtune.config.load import leaves, load_config, parse_setting
    from fedtune.federation.node.policy import Term

    flag = "--at-most"
    tables = [(f"{flag} {text}", parse_setting(text, flag)) for text in at_most]
    given = {key: (origin, table_value(table, key)) for origin, table in tables for key in leaves(table)}
    limits = load_config(flags=given)
    terms = [Term(key, "at most", value_at(limits.config, key)) for key in given]
    for term in terms:
        if isinstance(term.value, bool) or not isinstance(term.value, int | float):
            raise UsageError(f"--at-most takes numbers, and {term.key} is none.", hint=f"--set {term.key}={term.value}")
    return terms


def _check(settings: NodeSettings, superlink: str, ca: Path | None, key: Path | None, insecure: bool) -> list[str]:
    """Check all that a node needs, the quick things first; return what was found, in lines."""
    from importlib.metadata import version

    from fedtune.federation.flower.credentials import check_ca, check_key, check_superlink

    if ca:
        check_ca(ca)
    if key:
        check_key(key)
    reached = check_superlink(superlink, ca, insecure=insecure)
    if not reached:
        warn(f"nobody answers at {superlink} yet; a node keeps asking")
    if insecure:
        warn("without TLS anybody between here and the SuperLink can read and change the adapter")

    from fedtune.data.files import read_file
    from fedtune.data.prompt import fields_of, fill

    data = Path(settings.data)
    if not data.is_file():
        what = "a folder, and a node has one file" if data.is_dir() else "not there"
        raise MissingError(f"The data file {data} is {what}.", hint="Check the path given by --data.")
    # Which columns a run's own templates need is not known yet; those of the owner's are.
    table = read_file(data, [*fields_of(settings.instruction or ""), *fields_of(settings.response or "")])
    for path, template in (("data.instruction", settings.instruction), ("data.response", settings.response)):
        try:
            fill(template or "", table[0], path)
        except ConfigError as error:
            hint = f"Say which column of yours it is: --set '{path}=\"{{{table.column_names[0]}}}\"'"
            raise UsageError(f"{data} does not fit: {error.problems[0]}.", hint=hint) from None

    from fedtune.models.hub import resolve_base

    resolved = resolve_base(settings.model)

    from fedtune.models.base import check_files

    tokenizer, limits = check_files(settings.model, resolved.folder)
    if settings.instruction and settings.response:
        from fedtune.config.load import load_config
        from fedtune.config.schema import DataConfig
        from fedtune.data.tokenize import tokenize_rows
        from fedtune.federation.row_check import check_rows

        own = DataConfig(source=settings.data, instruction=settings.instruction, response=settings.response)
        checked = load_config().config.model_copy(update={"model": settings.model, "data": own})
        rows = tokenize_rows(table, own, tokenizer, checked.training.sequence_length)
        check_rows(rows, table, tokenizer, checked, limits, data.name)
    return [
        f"data {settings.data}: {len(table)} rows with the columns {', '.join(table.column_names)}",
        f"base model {settings.base}{f' at {resolved.revision}' if resolved.revision else ''}",
        f"fedtune {version('fedtune')}; runs of another version or base model are refused",
        *(f"takes part with {term}" for term in settings.terms),
        *([_account(settings, data)] if settings.state else []),
    ]


def _account(settings: NodeSettings, data: Path) -> str:
    """Return what this node's data has spent of its privacy, in a line; nothing is made."""
    from fedtune.config.schema import PrivacyConfig
    from fedtune.federation.account import AccountBook
    from fedtune.runs.directory import file_sha256

    book, name = AccountBook(Path(str(settings.state))), file_sha256(data)
    if book.is_new:
        return f"privacy account {book.file}: new, nothing is spent"
    try:
        account, others = book.account(name), book.others(name)
    except MissingError as error:
        if settings.insists_on_local_privacy:
            raise
        warn(f"{error} Until then this node refuses runs with local privacy.")
        return f"privacy account {book.file}: cannot be read"
    if others:
        warn(
            f"{book.file} has releases of {len(others)} other data files; a row that is in several has spent several budgets"
        )
    delta = next((float(term.value) for term in settings.terms if term.key == "privacy.delta"), PrivacyConfig().delta)
    count, spent = (len(account.releases), account.epsilon(delta)) if account else (0, 0.0)
    return f"privacy account {book.file}: {count} releases of this data, epsilon {spent:.2f} at delta {delta:g}"
