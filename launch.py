"""Fine-tune a language model with forward passes only.

  python launch.py train configs/demo.yaml                    start a run
  python launch.py train configs/demo.yaml run.steps=100      ... with a key of the recipe changed
  python launch.py tune configs/demo.yaml                     propose eps and lr before training
  python launch.py train --resume runs/demo-20260101-120000   continue an interrupted run
  python launch.py eval runs/demo-20260101-120000 --out scores.jsonl
  python launch.py eval configs/demo.yaml task.demonstrations=2 --out in_context.jsonl
  python launch.py eval configs/demo.yaml --linear-probe --out probe.jsonl
  python launch.py export runs/demo-20260101-120000 tuned     a folder that others load
  python launch.py report runs/demo-20260101-120000           its course as one HTML page
  python launch.py inspect runs/demo-20260101-120000          what its ledger holds
  python launch.py fork runs/demo-20260101-120000 runs/b --at 20 estimator.lr=5e-4
                                                              a branch, to be resumed
  ray job submit --working-dir . -- python launch.py train configs/demo.yaml run.dir=/shared/run

A recipe is a YAML file with the sections model, space, estimator, task, fleet and run;
configs/README.md lists every key. Exit codes: 0 done, 1 the run failed, 2 a mistake in the
command, the recipe or the data, 130 interrupted.
"""

import argparse
import faulthandler
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

from orchestrator import environment, inspection, output, run_folder, run_log, runs
from orchestrator.config import Config, ConfigError

AT_HELP = "the state after so many steps, or after the best look at dev rows; default: the last"
GRACE_S = 30.0  # from a signal to the end
logger = logging.getLogger(f"{run_log.LOGGER}.launch")
DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def main() -> int:
    arguments = _parse()
    signal.signal(signal.SIGTERM, _interrupt)  # what `ray job stop` sends
    run: run_folder.Run | None = None
    try:
        if arguments.command in ("report", "inspect", "fork"):
            _without_fleet(arguments)
            return DONE
        run = _open(arguments)
        environment.prepare(run.config.fleet.threads_per_replica)
        if arguments.command == "train":
            runs.train(run)
        elif arguments.command == "export":
            runs.export(run, arguments.folder, arguments.at)
        elif arguments.command == "tune":
            runs.tune(run, arguments.out or run.folder.with_name(f"{run.folder.name}-tune"))
        else:
            runs.evaluate(
                run,
                arguments.out,
                trained=Path(arguments.source).is_dir(),
                at=arguments.at,
                calibrated=arguments.calibrated,
                linear_probe=arguments.linear_probe,
            )
        return DONE
    except ConfigError as error:
        _tell(f"error: {error}")
        return MISTAKE
    except KeyboardInterrupt:
        _tell("interrupted" + _how_to_go_on(arguments, run))
        return INTERRUPTED
    except Exception as error:
        traceback.print_exc()  # into the run's log
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        _tell(f"failed: {message}" + _how_to_go_on(arguments, run))
        return FAILED


def _without_fleet(arguments: argparse.Namespace) -> None:
    """The verbs that read a run's folder and load no model."""
    folder = Path(arguments.source)
    run_folder.require(folder)
    if arguments.command == "report":
        print(runs.report(folder))
    elif arguments.command == "inspect":
        for line in inspection.inspect(folder):
            print(line)
    else:
        fork = run_folder.branch(folder, arguments.folder, arguments.overrides)
        run_folder.fork(fork, folder, arguments.at)
        print(_how_to_resume(fork.config, arguments.folder))


def _open(arguments: argparse.Namespace) -> run_folder.Run:
    """The run that the command names, checked as far as it can be without starting anything."""
    if arguments.command == "train" and arguments.verify_cache is not None:
        arguments.overrides.append(f"run.verify_cache={arguments.verify_cache}")
    if arguments.command == "train" and arguments.resume:
        return run_folder.reopen(Path(arguments.resume), arguments.overrides)
    source = Path(arguments.source)
    if arguments.command == "export" or (arguments.command == "eval" and source.is_dir()):
        judges = arguments.command == "eval"
        return run_folder.reopen(source, arguments.overrides, judges=judges)
    return run_folder.choose(source, arguments.overrides)


def _how_to_go_on(arguments: argparse.Namespace, run: run_folder.Run | None) -> str:
    if run is None or arguments.command != "train" or not run.ledger_path.exists():
        return ""
    resume = _how_to_resume(run.config, run.folder)
    return f"; the ledger is whole. Details: {run.log_path}\n{resume}"


def _how_to_resume(config: Config, folder: Path) -> str:
    """With what the recipe lets run, which is to be said again."""
    words = map(shlex.quote, [str(folder), *run_folder.code_overrides(config)])
    return " ".join(["continue with: python launch.py train --resume", *words])


def _tell(message: str) -> None:
    """To the user: standard error, or what standard output was once both go to the log."""
    if output.is_diverted():
        logger.error(message)
    print(message, file=output.terminal() if output.is_diverted() else sys.stderr, flush=True)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """End as on Ctrl-C; and all the same where a library swallows that, or never comes to its end.

    Nothing is lost thereby: what is in the ledger is on disk.
    """
    deadline = threading.Timer(GRACE_S, _end)
    deadline.daemon = True
    deadline.start()
    raise KeyboardInterrupt


def _end() -> None:
    faulthandler.dump_traceback()  # into the run's log
    _tell(f"interrupted; ended without a close, which took longer than {GRACE_S:.0f} s")
    os._exit(INTERRUPTED)


def _at(text: str) -> runs.At:
    """The argument of --at."""
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of steps, or best")
    return int(text)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="start a run, or continue one",
        description="Start a run from a recipe, or continue an interrupted one bit for bit.",
    )
    train.add_argument("source", nargs="?", metavar="CONFIG", help="such as configs/demo.yaml")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--resume", metavar="RUN_DIR", help="continue the run in this folder")
    train.add_argument(
        "--verify-cache",
        type=int,
        metavar="N",
        help="compute every Nth probe of a replica again without any reuse, and stop the run if "
        "the two differ; as run.verify_cache=N",
    )
    tune = commands.add_parser(
        "tune",
        help="propose eps and lr from measurements",
        description="Measure on the recipe's own rows, before any training, the loss's noise, its "
        "change over eps, its slopes and its curvature; propose eps and lr, with reasons. Some 170 "
        "probes. Writes tune.json and tune.html.",
    )
    tune.add_argument("source", metavar="CONFIG")
    tune.add_argument("overrides", nargs="*", metavar="section.key=value")
    tune.add_argument("--out", type=Path, metavar="DIR", help="by default runs/NAME-TIME-tune")
    evaluate = commands.add_parser(
        "eval",
        help="score the held-out examples",
        description="Score all held-out examples: given a recipe, under the base model; given a "
        "run folder, under the state that its ledger leads to.",
    )
    evaluate.add_argument("source", metavar="CONFIG-or-RUN_DIR")
    evaluate.add_argument("overrides", nargs="*", metavar="section.key=value")
    evaluate.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")
    evaluate.add_argument(
        "--calibrated",
        action="store_true",
        help="choose among options by how much the row speaks for each (surface form competition)",
    )
    evaluate.add_argument(
        "--linear-probe",
        action="store_true",
        help="choose by a logistic regression on final hidden states, fitted to the training rows",
    )
    evaluate.add_argument("--at", type=_at, metavar="STEP|best", help=AT_HELP)
    export = commands.add_parser(
        "export",
        help="write the trained model or adapter",
        description="Replay a run's ledger and write what it leads to: a Hugging Face folder that "
        "transformers and SGLang load, or with space.kind=lora an adapter for PEFT and SGLang, "
        "or with space.kind=prefix a prefix for PEFT.",
    )
    export.add_argument("source", metavar="RUN_DIR")
    export.add_argument("folder", metavar="OUT_DIR", type=Path)
    export.add_argument("--at", type=_at, metavar="STEP|best", help=AT_HELP)
    export.add_argument("overrides", nargs="*", metavar="section.key=value")
    report = commands.add_parser(
        "report",
        help="write a page about a run",
        description="Write RUN_DIR/report/index.html: the run's course, result and recipe on one "
        "page that needs no other file. Works on unfinished runs too.",
    )
    report.add_argument("source", metavar="RUN_DIR")
    inspect = commands.add_parser(
        "inspect",
        help="tell what a run's ledger holds",
        description="Check a run's ledger, every step of it, and tell its header, range, rates, "
        "dropped seeds and size. Changes nothing; exit code 2 if the ledger is damaged.",
    )
    inspect.add_argument("source", metavar="RUN_DIR")
    fork = commands.add_parser(
        "fork",
        help="start a branch of a run",
        description="Make NEW_DIR a run whose ledger holds the first STEP steps of RUN_DIR's, to "
        "be resumed under a recipe that may differ in what decides later steps.",
    )
    fork.add_argument("source", metavar="RUN_DIR")
    fork.add_argument("folder", metavar="NEW_DIR", type=Path)
    fork.add_argument("overrides", nargs="*", metavar="section.key=value")
    fork.add_argument("--at", required=True, type=int, metavar="STEP")
    arguments, others = parser.parse_known_args()
    for other in others:  # overrides that stand behind an option
        if other.startswith("-") or "=" not in other or "overrides" not in arguments:
            parser.error(f"unrecognized argument: {other}")
        arguments.overrides.append(other)
    if arguments.command == "train":
        if arguments.resume and arguments.source and "=" in arguments.source:
            arguments.overrides.insert(0, arguments.source)
        elif bool(arguments.resume) == bool(arguments.source):
            train.error("give either a recipe or --resume RUN_DIR")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
