"""Prints a configuration as a run gets it: every key with its value, where the value comes from, and what it means.

    .venv/bin/python -m tools.show_config --config configs/papo_d_7b.yaml
    .venv/bin/python -m tools.show_config --config configs/papo_d_7b.yaml --differences  what it changes
    .venv/bin/python -m tools.show_config --config configs/demo.yaml --set seed=2 --only optimizer
    .venv/bin/python -m tools.show_config --run runs/demo  what the run goes by
    .venv/bin/python -m tools.show_config --living  what may change while a run lives

Each key stands on a line of its own, `key: value   (source, kind)`, with its meaning below. The source is the file that
sets the key, `--set`, or `default`. The kind is `frozen` (another value needs a run of another name) or `living` (may
change while the run lives). Last come notes on settings that do less than their names promise.
"""

import argparse
import json
import signal
import textwrap
from collections.abc import Iterator
from pathlib import Path

from megatron_papo.config import (
    Config,
    Living,
    Section,
    default_of,
    is_living,
    meaning_of,
    present_keys,
    section_type,
    value_of,
)
from megatron_papo.config_files import DEFAULT, ResolvedConfig, resolve_config
from megatron_papo.config_notes import notes
from megatron_papo.errors import UserError
from megatron_papo.run.command_line import run

WIDTH = 110


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration, e.g. configs/demo.yaml")
    what.add_argument("--run", type=Path, metavar="DIR", help="run directory: reads its config.yaml")
    what.add_argument("--living", action="store_true", help="print the table of living keys, in Markdown")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value (may be repeated)",
    )
    parser.add_argument(
        "--differences",
        action="store_true",
        help="only what differs from the first file that FILE extends; where it extends none, from the defaults",
    )
    parser.add_argument("--only", metavar="KEY", default="", help="only this key or section, e.g. optimizer")
    return parser.parse_args()


def main() -> None:
    args = parse()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it silently
    if args.living:
        print("\n".join(living_table()))
        return
    path = args.config or args.run / "config.yaml"
    resolved = resolve_config(path, args.overrides)
    keys = [key for key in present_keys(resolved.config) if f"{key}.".startswith(f"{args.only}." if args.only else "")]
    if not keys:
        raise UserError(f"--only {args.only}: no such key in {path}: see --help")
    shown = [key for key in keys if not args.differences or differs(resolved, key)]
    print(f"# {path}" + (f", what differs from {resolved.base or 'the defaults'}" if args.differences else ""))
    for key in shown:
        print("\n".join(entry(resolved, key)))
    for note in notes(resolved.config):
        print(f"\nnote: {note}")


def differs(resolved: ResolvedConfig, key: str) -> bool:
    """Say whether a key is set beside the base, or, without a base, to something else than its default."""
    if resolved.base is not None:
        return resolved.source_of(key) not in (resolved.base, DEFAULT)
    return value_of(resolved.config, key) != default_of(key)


def entry(resolved: ResolvedConfig, key: str) -> list[str]:
    """Return the lines of one key: value, source and kind, meaning."""
    value = value_of(resolved.config, key)
    text = value if isinstance(value, str) and value.isprintable() and value else json.dumps(value, ensure_ascii=False)
    kind = "living" if is_living(key) else "frozen"
    meaning = textwrap.wrap(meaning_of(key), WIDTH, initial_indent="    ", subsequent_indent="    ")
    return [f"{f'{key}: {text}':<50}  ({resolved.source_of(key)}, {kind})", *meaning]


def living_table() -> list[str]:
    """Return the table of living keys as lines of Markdown; a section that is living as a whole is one row."""
    rows = [f"| `{key}` | {reason} |" for key, reason in living_keys(Config)]
    return ["| key | why it may change |", "|---|---|", *rows]


def living_keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, or section and `.*`; reason) of what is marked as living."""
    for name, field in section.model_fields.items():
        below = section_type(field)
        reason = next((mark.reason for mark in field.metadata if isinstance(mark, Living)), None)
        if reason is not None:
            yield prefix + name + (".*" if below else ""), reason
        elif below is not None:
            yield from living_keys(below, f"{prefix}{name}.")


if __name__ == "__main__":
    run(main)
