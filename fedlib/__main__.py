"""The command line: python -m fedlib data | run | serve-client | page | score | status | prove | schema | labs."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from fedlib.data import sets, sources
from fedlib.engines import select
from fedlib.engines.in_process import Engine
from fedlib.engines.ranks import Ranks
from fedlib.engines.select import open_engine
from fedlib.errors import Diverged, FedlibError, RunError, SpecError
from fedlib.runs import fitting, fleet, grid, leftovers, placement, record, shard_files, shares, validation
from fedlib.runs.experiments import Experiment, papers, profiles, specs
from fedlib.runs.progress import expect, steady, tell
from fedlib.runs.spec import PROFILES, Spec


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(format="%(message)s")
    options = parser().parse_args(arguments)
    try:
        if options.call not in (data, replay, serve_client) and not papers():
            raise SpecError(
                f"{sources.home()}: no project, it has no experiments; go to a checkout, or set FEDLIB_HOME"
            )
        leftovers.sweep(sources.home())
        options.call(options)
        sys.stdout.flush()  # now, while a full disk can still be told
    except FedlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was recorded is kept, and an unfinished run goes on from its checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        _forget_output()
    except OSError as error:
        if error.filename is None:
            _forget_output()
        what, why = error.filename or "a file, or the output", error.strerror or error
        print(f"error: {what}: cannot be read or written ({why}); free the disk, or the folder", file=sys.stderr)
        return 2
    return 0


def _forget_output() -> None:
    """What could not be printed is not tried again at the end."""
    with contextlib.suppress(OSError):  # no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m fedlib", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="command")

    def command(call: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        """One that goes by the function's name, with its docstring as help."""
        added = commands.add_parser(call.__name__.replace("_", "-"), help=call.__doc__)
        added.set_defaults(call=call)
        return added

    fetching = command(data)
    fetching.add_argument("action", choices=("get", "check"), help="get: fetch and verify; check: verify what is here")
    fetching.add_argument("names", nargs="+", metavar="name", help=", ".join(sets.ENTRIES))
    fetching.add_argument(
        "--mirror", type=Path, help="folder with copies of the files (also: environment FEDLIB_MIRROR)"
    )

    running, paging = command(run), command(page)
    for training in (running, paging):
        training.add_argument("paper", help=", ".join(papers()))
        training.add_argument("--profile", choices=PROFILES, default="lab", help="scale of the runs (default: lab)")
        training.add_argument("--engine", default="auto", help=", ".join(select.ENGINES))
        training.add_argument("--device", default="auto", help="auto (a GPU, but for small runs), cpu, cuda, cuda:1")
        training.add_argument("--processes", type=int, help="workers of the pool (default: one a core)")
    running.add_argument(
        "--only", default="*", metavar="PATTERN", help="run names to take, e.g. '*iid*' (default: all)"
    )
    running.add_argument("--again", action="store_true", help="train even where a fresh record stands")
    running.add_argument("--share", metavar="I/N", help="the I-th of N shares of about equal time, for N processes")
    fleet.add_server_options(running)
    paging.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    paging.set_defaults(only="*", again=False, share=None)

    command(score).add_argument("--profile", choices=PROFILES, default="lab")
    command(status).add_argument("--profile", choices=PROFILES, help="one profile only")
    command(prove).add_argument(
        "commit", help="whose records count, and whose code is run beside that which stands here"
    )
    fleet.add_node_options(command(serve_client))
    cutting = command(shards)
    cutting.add_argument("paper", help=", ".join(papers()))
    cutting.add_argument("--profile", choices=PROFILES, default="lab")
    cutting.add_argument("--only", default="*", metavar="PATTERN", help="of these runs (default: all)")
    cutting.add_argument("--clients", required=True, metavar="3,7", help="of the node, such as 3,7 or 0-4")
    cutting.add_argument("--folder", type=Path, required=True, help="where to")
    command(replay)
    command(schema)
    writing = command(labs)
    writing.add_argument("--folder", type=Path, help="where to (default: labs, in the project)")
    writing.add_argument("--replace", action="store_true", help="write over notebooks that have been changed")
    return top


def data(options: argparse.Namespace) -> None:
    """fetch or check data sets"""
    for name in options.names:
        if options.action == "get":
            sources.get(name, mirror=options.mirror)
        else:
            print(f"{name}: {sources.verify(name)} is as it should be")


def run(options: argparse.Namespace) -> None:
    """train the runs that have no fresh record"""
    if options.engine == "ranks" and os.environ.get("RANK", "0") != "0":
        with open_engine(options.engine, options.device) as engine:
            assert isinstance(engine, Ranks)
            engine.serve()
        return
    planned = list(record.fresh(specs(options.paper, options.profile, options.only)))
    if options.share is not None:
        planned = list(shares.take(planned, options.share, sources.home() / ".cache" / "shares"))
    left = {spec.name: (spec, reason or "asked for again") for spec, _, reason in planned if reason or options.again}
    where = select.check(options.engine, options.device, options.processes)
    for name in dict.fromkeys(spec.data for spec, _ in left.values()):
        sources.verify(name)  # now, not after hours of training on the others
    runs, processes = [spec for spec, _ in left.values()], options.processes or select.cores()
    fitting.check(runs)
    groups = {options.device: runs}
    if runs and (options.engine, options.device, where.type) == ("auto", "auto", "cuda"):
        groups = placement.groups(runs, processes)
    parts = [f"{len(group)} to train on {select.device(on).type}" for on, group in groups.items()]
    todo = f"{len(planned)} runs, {' and '.join(parts)}"
    if runs:
        seen = ((spec, found) for spec, found, _ in planned)
        todo += f", {expect(runs, seen, processes, on_cpu=where.type == 'cpu')}"
    print(f"{options.paper}, profile {options.profile}: {todo}", flush=True)
    failed = []
    for on, group in groups.items():
        if options.engine == "flower" and not group:
            continue
        with opened(options, on) as engine:
            if options.engine == "auto" and engine.device.type == "cpu" and len(group) > processes > 1:
                done = grid.run_all(group, processes, again=options.again)
            else:
                done = (grid.attempt(spec, engine, again=options.again) for spec in group)
            failed += told(group, done, {name: why for name, (_, why) in left.items()})
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed, the others are kept; the first: {failed[0]}")


def opened(options: argparse.Namespace, on: str) -> contextlib.AbstractContextManager[Engine]:
    if options.engine == "flower":
        return fleet.open_engine(options, on)
    return open_engine(options.engine, on, options.processes)


def told(runs: list[Spec], done: Iterable[record.Record | RunError], reasons: dict[str, str]) -> list[RunError]:
    """Say of each run how it ended; the failures."""
    failed, begin = list[RunError](), time.monotonic()
    bar = steady(tqdm(done, total=len(runs), unit="run", disable=None))
    for number, (spec, result) in enumerate(zip(runs, bar, strict=True), 1):
        if isinstance(result, RunError):
            finding = spec.may_diverge and isinstance(result, Diverged)
            failed += [] if finding else [result]
            tqdm.write(f"{'diverged' if finding else 'failed'}: {result}")
            continue
        name, final = result["spec"]["name"], result["final"]
        line = f"accuracy {final['accuracy']:.1%}, uplink {final['uplink_bytes'] / 1e6:.1f} MB"
        left = tell((time.monotonic() - begin) / number * (len(runs) - number))
        tqdm.write(f"{name}: {line} (trained: {reasons[name]}); {number} of {len(runs)}, {left} left")
        if lost := record.lost(result):
            failed.append(RunError(f"{name}: its record does not count: {lost[0]}"))
            tqdm.write(str(failed[-1]))
    return failed


def page(options: argparse.Namespace) -> None:
    """run what a paper's page needs, then make the page"""
    from fedlib.pages import execute

    if any(name == "profile" for name, _ in options.parameter):
        raise SpecError("parameter: 'profile' is given by --profile, so that the page shows the runs that it needs")
    if options.engine in ("ranks", "flower"):
        raise SpecError(f"engine: {options.engine} is for run; train first, then make the page with another engine")
    execute.check_parameters(options.paper, {"profile": options.profile, **dict(options.parameter)})
    on = open_engine(options.engine, options.device, options.processes)
    on.close()
    if options.profile == "paper" and on.device.type != "cuda":
        print("profile paper is not trained without a GPU; the page shows the records that exist")
        folder = sources.home() / "records" / options.paper / options.profile
        folder.mkdir(parents=True, exist_ok=True)  # DVC asks for it
    elif options.paper in papers():  # other pages show what these have left
        run(options)
    print(f"made {execute.make(options.paper, options.profile, dict(options.parameter))}")


def score(options: argparse.Namespace) -> None:
    """hold the papers' claims against the records; writes scores/"""
    from fedlib.claims import score as scoring

    results = []
    for paper in scoring.scored():
        if options.profile in profiles(paper):
            results += scoring.scores(paper, options.profile)
        else:
            print(f"{paper}  left out: it has no runs at profile {options.profile}")
    scoring.write(results)
    for s in results:
        effect = s.finding.effects[0] if s.finding else None
        measured = f"{effect.mean:.4g} [{effect.low:.4g}, {effect.high:.4g}]" if effect else "-"
        note = f"  ({s.note})" if s.note else ""
        print(f"{s.paper}  {s.claim['id']:28} {s.verdict or 'observed':26} {measured}{note}")
    print(f"scores/ holds profile {options.profile}")


def status(options: argparse.Namespace) -> None:
    """every record: fresh or stale, when, where, how long"""
    for paper in papers():
        for profile in [p for p in profiles(paper) if options.profile in (None, p)]:
            for spec, found, reason in record.fresh(specs(paper, profile)):
                state = "fresh" if not reason else "STALE" if found else "-"
                made = found["made"] if found and "fault" not in found else None
                when = f"{made['time'][:10]} {made['seconds']:8.1f} s  {made['device']}" if made else ""
                print(f"{state:5}  {paper}/{profile}/{spec.name:45} {when}  {reason}".rstrip())


def prove(options: argparse.Namespace) -> None:
    """show by running that the code of a commit makes equal records; stamp them"""
    from fedlib.runs import proof

    made = proof.prove(options.commit)
    print(f"equal; what was run stands in {made}" if made else "nothing to stamp")


def serve_client(options: argparse.Namespace) -> None:
    """a node of --engine flower: train clients for a server, until stopped"""
    fleet.serve(fleet.node_of(options), options)


def shards(options: argparse.Namespace) -> None:
    """write the samples of some clients, for a node that is to hold no others"""
    clients = fleet.clients_of(options.clients) or frozenset()
    chosen = {shard_files.name_of(spec): spec for spec in specs(options.paper, options.profile, options.only)}
    for spec in chosen.values():
        print(shard_files.save(spec, clients, options.folder))


def replay(options: argparse.Namespace) -> None:
    """for prove: read specs, a line each, and write their records"""
    from fedlib.runs import proof

    proof.replay(sys.stdin, sys.stdout)


def schema(options: argparse.Namespace) -> None:
    """write what editors need to complete and check experiments and claims"""
    from fedlib.claims.published import Published

    for folder, model in (("experiments", Experiment), ("published", Published)):
        target = sources.home() / folder / "schema.json"
        record.write(target, (json.dumps(validation.schema(model), indent=1) + "\n").encode())
        print(target)


def labs(options: argparse.Namespace) -> None:
    """write the labs as notebooks, for students and for teachers"""
    from fedlib.labs import notebooks

    for path in notebooks.write(options.folder or sources.home() / "labs", replace=options.replace):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
