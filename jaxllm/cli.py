"""The command line. Modules are imported by the command that needs them, so that --help and errors come at once.

Standard output carries results alone; progress, warnings and errors go to standard error. Exit status: 0 done, 1 failed,
2 used wrongly, 130 interrupted.
"""
import argparse
import logging
import os
import sys
from pathlib import Path

from jaxllm.commands.options import Parser
from jaxllm.errors import JaxllmError

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs a command; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):  # one that is not UTF-8 shows what it has no letters for as \u....: nothing is lost
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="jaxllm: %(message)s", stream=sys.stderr)
    try:
        args = build_parser().parse_args(argv)
        if getattr(args, "compile_cache_dir", "off") is None:
            args.compile_cache_dir = str(cache_home())
        if args.verbose:
            logging.getLogger("jaxllm").setLevel(logging.INFO)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("jaxllm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except JaxllmError as e:
        if debug:
            raise
        print(f"jaxllm: error: {_one_line(e)}", file=sys.stderr)
        return e.exit_status
    except BaseException as e:  # whatever it is: the panics of Rust libraries are no Exceptions
        if debug or isinstance(e, (SystemExit, GeneratorExit)):
            raise
        print(f"jaxllm: error: {type(e).__name__}: {_one_line(e)} (--debug shows where)", file=sys.stderr)
        return 1


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("jaxllm")
    except PackageNotFoundError:
        return "0+unknown"


def cache_home() -> Path:
    """Where compiled programs are kept: JAXLLM_CACHE_DIR, else XDG_CACHE_HOME/jaxllm, else ~/.cache/jaxllm."""
    if folder := os.environ.get("JAXLLM_CACHE_DIR"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxllm"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from jaxllm.commands import doctor, generate, model, verify
    parser = Parser(prog="jaxllm", description="Language-model inference in pure JAX: the same request gives the same bits.",
                    allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jaxllm {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    common.add_argument("--verbose", action="store_true", help="log what is loaded and chosen")
    generate.add_parser(commands, common)
    model.add_parsers(commands, common)
    verify.add_parser(commands, common)
    doctor.add_parser(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
