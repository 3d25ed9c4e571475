"""What README, CONTRIBUTING and docs/ tell a reader to type exists: modules, options, settings, targets of make, files.

A command is a line of a code block, or an inline code span, that begins with one of HEADS. It must run from a fresh
shell in the repository, so `python -m tools.convert`, which needs an activated environment, is a mistake.
"""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_papo.config_files import load_config
from megatron_papo.errors import UserError
from tests.helpers import DEMO_CONFIG, ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]
LISTS_OF_PACKAGES = sorted(ROOT.glob("requirements*.txt"))
ROOMS = {path.name for path in (ROOT / "megatron_papo").iterdir() if path.is_dir()}
TOP_LEVEL = {"configs", "docs", "examples", "megatron_papo", "stages", "tests", "tools", ".ci"}
HEADS = ("bash ", "make ", ".venv/bin/", "python", "torchrun", "sbatch ")


def code_pieces(text: str) -> list[str]:
    """Return the lines of code blocks, fenced or indented, and the inline code spans of a Markdown page."""
    pieces, fenced, prose = [], False, []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            pieces.append(line.strip())
        else:
            prose.append(line)
    return pieces + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", "\n".join(prose))]


def commands_of(text: str) -> list[str]:
    """Return the commands of a page: also those within a loop, a substitution, or after VARIABLE=value."""
    pieces = [
        (re.sub(r"\$\([^)]*\)", "OUTPUT", piece), *re.findall(r"\$\(([^)]*)\)", piece)) for piece in code_pieces(text)
    ]
    parts = [part.strip() for piece in sum(pieces, ()) for part in re.split(r"; do |;|&&", piece)]
    parts = [re.sub(r"^(\w+=\S+ )+", "", part) for part in parts]
    return [part for part in parts if part.startswith(HEADS) and " " in part]


@functools.cache
def help_of(module: str, *subcommand: str) -> str:
    """Return what `python -m module [subcommand] --help` prints; run in this process, so that torch is loaded once."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = [module, *subcommand, "--help"]
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            warnings.simplefilter("ignore", RuntimeWarning)  # a test of this process has imported the module already
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    finally:
        sys.argv = before
    return printed.getvalue() if ended.value.code in (0, None) else ""


@functools.cache
def help_of_script(script: str) -> str:
    """Return what `bash script --help` prints."""
    return subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout


def problem_of(command: str) -> str | None:
    """Return why a command of a page would not run as typed, or None."""
    words = shlex.split(command.replace("[", " ").replace("]", " "), comments=True)
    match words:
        case ["bash", "tests/run.sh", *places]:
            gone = [place for place in places if place.startswith("tests") and not (ROOT / place).exists()]
            return f"no {gone[0]}" if gone else None
        case ["sbatch", *arguments]:  # sbatch's own options, then those of run_all.sh, or a stage with its own
            _, *arguments = arguments[arguments.index("stages/submit.slurm") :]
            if arguments and arguments[0].startswith("stage"):
                return module_problem(f"stages.{arguments[0]}", arguments[1:])
            return options_problem(arguments, help_of_script("run_all.sh"))
        case ["bash", *arguments]:
            scripts = [argument for argument in arguments if argument.endswith((".sh", ".slurm"))]
            return options_problem(arguments, help_of_script(scripts[0]))
        case ["make", target]:
            done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
            return done.stderr.strip() if done.returncode else None
        case [".venv/bin/python", "-m", module, *arguments]:
            return module_problem(module, arguments)
        case [".venv/bin/python", script, *_]:
            return None if (ROOT / script).is_file() else f"no {script}"
        case [program, *_] if program.startswith(".venv/bin/"):
            return None if (Path(sys.executable).parent / Path(program).name).exists() else f"no {program}"
    return "does not run from a fresh shell: begin with .venv/bin/"


def module_problem(module: str, arguments: list[str]) -> str | None:
    """The same for `.venv/bin/python -m module arguments`."""
    if importlib.util.find_spec(module) is None:
        return f"no module {module}"
    if module.split(".")[0] not in ("stages", "tools"):
        return None
    text = help_of(module)
    if not text:
        return f"{module} --help ends with an error"
    subcommands = arguments[0].strip("{}").split(",") if arguments else []
    if not all(re.search(rf"[{{,]{re.escape(name)}[,}}]", text) for name in subcommands):
        subcommands = []
    texts = [help_of(module, subcommand) for subcommand in subcommands] or [text]
    return next((problem for text in texts if (problem := options_problem(arguments, text))), None)


def options_problem(arguments: list[str], help_text: str) -> str | None:
    """Return which option of a command its help does not know, or which setting or configuration does not exist."""
    known = set(re.findall(r"--[a-z][a-z-]*", help_text))
    for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        if option not in known:
            return f"no option {option}"
    following = list(zip(arguments, arguments[1:], strict=False))
    configs = [
        ROOT / value for option, value in following if option == "--config" and re.match(r"configs/[^$]*$", value)
    ]
    settings = [re.sub(r"\$seed|%a", "1", value) for option, value in following if option == "--set" and "=" in value]
    if not all(config.is_file() for config in configs):
        return f"no {configs[0]}"
    try:
        load_config(configs[0] if configs else DEMO_CONFIG, settings)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run_as_typed(page):
    problems = {command: problem_of(command) for command in commands_of(page.read_text())}
    assert {command: problem for command, problem in problems.items() if problem} == {}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("    python -m tools.convert inspect DIR", "fresh shell"),
        ("as `torchrun -m stages.stage5_train` does", "fresh shell"),
        ("```\n.venv/bin/python -m tools.convent inspect DIR\n```", "no module tools.convent"),
        ("    .venv/bin/python -m tools.convert to-hf --hf DIR --output DIR", "no option --hf"),
        ("    .venv/bin/python -m tools.convert to-hf [--shard-bytes N]", "no option --shard-bytes"),
        ("    .venv/bin/python -m tools.sglang_server {status,stop} --hf DIR", "no option --hf"),
        ("    for seed in 1 2; do bash run_all.sh --nome seed$seed; done", "no option --nome"),
        ("    bash run_all.sh --set objective.kl_prcp=0.2", "objective"),
        ("    bash run_all.sh --config configs/papo_x.yaml", "configs/papo_x.yaml"),
        ("    X=1 bash tests/run.sh tests/nothing -x", "no tests/nothing"),
        ("`make quickly`", "quickly"),
        ("    sbatch --nodes 3 stages/submit.slurm --nome x", "no option --nome"),
        ("    sbatch --nodes 3 stages/submit.slurm stage5_train --run x --iterate 1", "no option --iterate"),
        ("    sbatch --nodes 3 stages/submit.slurm stage5_trian --run x", "no module stages.stage5_trian"),
        ("    bash run_all.sh \\\n        --nome x", "no option --nome"),
        ("`.venv/bin/papo-covert --help`", "no .venv/bin/papo-covert"),
    ],
)
def test_a_command_that_would_fail_is_noticed(text, problem):
    [command] = commands_of(text)
    assert problem in (problem_of(command) or "")


def test_the_pages_have_commands():
    """The reader of pages above sees what a person sees, in its three forms."""
    assert sum(len(commands_of(page.read_text())) for page in PAGES) > 30
    text = "a `bash run_all.sh --dry-run`\n\n    make quick\n\n```\nA=1 .venv/bin/python -m tools.plan # why\n```\n"
    assert len(commands_of(text)) == 3


def missing_paths(text: str, page: Path) -> list[str]:
    """Return the paths that a page names and that are not there: links, `room/file.py`, `tests/...`, `docs/...`."""
    prose = text if page.suffix == ".txt" else " ".join(re.findall(r"`([^`]+)`", text))
    missing = [link for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text) if not (page.parent / link).exists()]
    for name in re.findall(r"(?<![\w/.*-])[\w.*-]+(?:/[\w.*-]+)+/?", prose):
        first, name = name.split("/")[0], name.rstrip(".")
        if first in TOP_LEVEL and not list(ROOT.glob(name.rstrip("/"))):
            missing.append(name)
        if first in ROOMS - TOP_LEVEL and name.endswith(".py") and not (ROOT / "megatron_papo" / name).is_file():
            missing.append(name)
    return missing


@pytest.mark.parametrize("page", PAGES + LISTS_OF_PACKAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    assert missing_paths(page.read_text(), page) == []


def test_a_file_that_was_moved_is_noticed():
    text = "[a](gone.md) `tests/gone/test_it.py` [b](status.md#part) `model/gone.py` `model/vision.py` `data/images/`"
    assert missing_paths(text, ROOT / "docs" / "page.md") == ["gone.md", "tests/gone/test_it.py", "model/gone.py"]
    listed = "torch==1 # model/gone.py, model/vision.py, tools/gone.sh"
    assert missing_paths(listed, ROOT / "requirements.txt") == ["model/gone.py", "tools/gone.sh"]
