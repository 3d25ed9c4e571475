"""Download what a run reads from the Hugging Face hub, where there is a network, for machines that have none.

    .venv/bin/python -m tools.prefetch --config configs/papo_g_3b.yaml

Gets the model, unless model.path is a directory that is there, and every data set that is named by its name on the hub,
into the cache of the Hugging Face libraries ($HF_HOME); what is there already is not downloaded again. Then it prints
the variables and settings with which the run starts without a network. $HF_HOME must be on a file system that the
other machine sees. A hub of your own: $HF_ENDPOINT; what is behind a login: $HF_TOKEN, or .venv/bin/hf auth login.
"""

import argparse
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_papo.config import Config, PromptSource
from megatron_papo.config_files import load_config
from megatron_papo.data.hub_files import download, is_offline, sizes_on_hub, wanted_files
from megatron_papo.data.rows import load_from_hub
from megatron_papo.data.set_files import files_of, has_known_names
from megatron_papo.errors import UserError
from megatron_papo.reading import reading, shown
from megatron_papo.run.command_line import run
from megatron_papo.run.stages import set_section

OFFICIAL = re.compile(r"Qwen2\.5-VL-\w+-Instruct")
"""Directories of this name are copies of the model Qwen/NAME."""
NOT_READ = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*"]
"""Files that no stage reads: the same weights in other formats."""
CACHES = ("HF_HUB_CACHE", "HF_DATASETS_CACHE")
"""Variables that put parts of the cache elsewhere than below $HF_HOME."""


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    config = load_config(args.config, args.overrides)
    if is_offline():
        raise UserError("HF_HUB_OFFLINE is set: unset it here, where there is a network")
    model = get_model(config, args.model)
    for name, source in sources(config).items():
        get_data(name, source)
    print("\n".join(["", "Where there is no network:", "", *advice(args.config, args.overrides, model)]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=".venv/bin/python -m tools.prefetch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="configuration of the run, or its config.yaml")
    set_help = "override one value (may be repeated), as for run_all.sh"
    add("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE", help=set_help)
    model_help = (
        "model on the hub (default: model.path where it is such a name, or a Qwen2.5-VL-...-Instruct directory)"
    )
    add("--model", metavar="OWNER/NAME", help=model_help)
    return parser.parse_args(arguments)


def sources(config: Config) -> dict[str, PromptSource]:
    """Return the sets of prompts of a run, by their keys."""
    sets: dict[str, PromptSource | None] = {"data.train": config.data.train, "data.sft": config.data.sft}
    sets |= {set_section(name)[1]: source for name, source in config.evaluation_sets.items()}
    return {name: source for name, source in sets.items() if source is not None}


def get_model(config: Config, named: str | None) -> Path | None:
    """Return the directory of the run's model, downloaded where it is not there; None where stage 1 makes it.

    Raises UserError where it is neither there nor on the hub.
    """
    path = config.model.path
    if named is None and path is None:
        print("model.path: null: stage 1 makes the model", flush=True)
        return None
    if named is None and path is not None and Path(path).is_dir():
        print(f"model.path: {path} is there", flush=True)
        return None
    name = named or hub_name(str(path))
    from huggingface_hub import snapshot_download

    print(f"model.path: downloading {name}", flush=True)
    with reading(name, "give --model another name"), from_hub(name, "model"):
        directory = Path(snapshot_download(name, ignore_patterns=NOT_READ))
    if not (directory / "config.json").is_file():
        raise UserError(f"{name}: no config.json in it: give --model the name of a Qwen2.5-VL checkpoint")
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    print(f"model.path: {name} is in {directory}, {size / 1e9:.1f} GB", flush=True)
    return directory


def hub_name(path: str) -> str:
    """Return what a model is called on the hub that should be at a path. Raises UserError where that is not known."""
    if OFFICIAL.fullmatch(Path(path).name):
        return f"Qwen/{Path(path).name}"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        return path
    raise UserError(
        f"model.path {shown(path)}: not there, and no name of the hub: say which model with --model OWNER/NAME"
    )


def get_data(name: str, source: PromptSource) -> None:
    """Download a set of prompts, unless it is made or lies in files. Raises UserError."""
    if source.source == "synthetic" or files_of(source).tables:
        print(f"{name}: {source.source} is not from the hub", flush=True)
        return
    print(f"{name}: downloading {source.source}, split {source.split}", flush=True)
    with reading(f"{name}.source {source.source}", "correct it, or its split"), from_hub(source.source, "data set"):
        if has_known_names(source):
            wanted = wanted_files(source, sizes_on_hub(source.source))
            if wanted.missing:
                raise UserError(*wanted.missing)
            download(source.source, wanted.sizes)
            what = f"{len(wanted.sizes)} files, {sum(wanted.sizes.values()) / 1e9:.2f} GB"
        else:
            what = f"{len(load_from_hub(source))} rows"
    print(f"{name}: {source.source}, split {source.split}, {what}", flush=True)


@contextmanager
def from_hub(name: str, kind: str) -> Iterator[None]:
    """Turn what the hub refuses, or a network that is not there, into a UserError."""
    import httpx
    from huggingface_hub import constants, errors

    cure = "check the name; if it is behind a login, set HF_TOKEN or run .venv/bin/hf auth login"
    unknown = UserError(f"{shown(name)}: no such {kind} on {constants.ENDPOINT}: {cure}")
    try:
        yield
    except (errors.HFValidationError, errors.RepositoryNotFoundError):
        raise unknown
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError, ConnectionError) as error:
        why = shown(" ".join(str(error).split()))
        raise UserError(
            f"{shown(name)}: {constants.ENDPOINT} does not give it ({why}): is there a network here? {cure}"
        )
    except FileNotFoundError:  # as datasets says it
        raise unknown


def advice(config: Path, overrides: Sequence[str], model: Path | None) -> list[str]:
    """Return the commands that start the run without a network."""
    from huggingface_hub import constants

    variables = {"HF_HOME": os.path.abspath(constants.HF_HOME), "HF_HUB_OFFLINE": "1"}
    variables |= {name: os.path.abspath(os.environ[name]) for name in CACHES if os.environ.get(name)}
    settings: list[Any] = [value for value in overrides if not (model and value.startswith("model.path="))]
    if model is not None:
        settings.append(f"model.path={model}")
    command = ["bash", "run_all.sh"]
    if config.name == "config.yaml" and config.parent.parent.name == "runs":
        command += ["--name", config.parent.name]  # of a run that has been started
    else:
        command += ["--config", str(config)]
    command += [word for value in settings for word in ("--set", value)]
    exported = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    return [f"    export {exported}", f"    {shlex.join(command)}"]


if __name__ == "__main__":
    run(main)
