"""Which Python tools/setup_environment.sh takes, for which device it installs, and when it makes an environment again.

Pythons and pips that only write down what they are asked stand in for real ones, which would download gigabytes; the
last test installs small packages with a real pip."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.helpers import ROOT

PYTHON = """#!/bin/bash
case "$*" in
  *version_info*) echo {version} ;;
  "-m tools.check_gpu"*)
    if [[ -e refuse${{3:-}} ]]; then echo "error: refused by check_gpu" >&2; exit 2; fi ;;
  "-m venv --clear "*)
    self=$(<"$0"); rm -rf "$4"; mkdir -p "$4/bin"; echo "$self" >"$4/bin/python"; chmod +x "$4/bin/python"
    printf '#!/bin/bash\\necho "$(basename "$(dirname "$(dirname "$0")")") $*" >>calls.txt\\n' >"$4/bin/pip"
    chmod +x "$4/bin/pip"; echo "venv {version} $4" >>calls.txt ;;
esac
"""
REQUIREMENTS = (
    "requirements.txt", "requirements-test.txt", "requirements-dev.txt", "requirements-sglang.txt",
    "requirements-sglang-cpu.txt", "requirements-sglang-cuda.txt",
)  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    """A tree with the script and empty lists of packages; bin/ is where its Pythons are."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "tools" / "setup_environment.sh", tmp_path / "tools")
    for name in (*REQUIREMENTS, "pyproject.toml"):
        (tmp_path / name).write_text("")
    return tmp_path


def add_python(tree, name: str, version: str):
    """Put a Python of a version under a name."""
    path = tree / "bin" / name
    path.write_text(PYTHON.format(version=version))
    path.chmod(0o755)


def set_up(tree, *arguments, **environment):
    """Run the script with no Python but those of the tree; return its exit status, what it said and what it called."""
    (tree / "calls.txt").unlink(missing_ok=True)
    for program in (
        "bash",
        "sed",
        "cat",
        "sha256sum",
        "dirname",
        "basename",
        "flock",
        "mkdir",
        "rm",
        "cp",
        "chmod",
        "grep",
        "uname",
    ):
        if not (tree / "bin" / program).exists():
            (tree / "bin" / program).symlink_to(shutil.which(program))
    command = ["bash", "tools/setup_environment.sh", *arguments]
    clean = {"PATH": str(tree / "bin"), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(command, cwd=tree, env=clean | environment, capture_output=True, text=True, timeout=60)
    calls = (tree / "calls.txt").read_text() if (tree / "calls.txt").exists() else ""
    return done.returncode, done.stdout + done.stderr, calls


def installed_from(tree, checkout):
    """Leave what pip leaves of an editable install."""
    (tree / ".venv" / "bin" / "papo-convert").write_text("")
    record = tree / ".venv/lib/python3.11/site-packages/megatron_papo-0.2.0.dist-info/direct_url.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f'{{"dir_info": {{"editable": true}}, "url": "file://{checkout}"}}')


def test_another_python3_is_passed_over(tree):
    add_python(tree, "python3", "3.13")
    add_python(tree, "python3.12", "3.12")
    status, said, calls = set_up(tree)
    assert status == 0 and "with python3.12, Python 3.12" in said
    assert "venv 3.12 .venv\n" in calls and "venv 3.12 .venv-sglang\n" in calls
    assert "-r requirements.txt -r requirements-test.txt -r requirements-dev.txt" in calls
    assert "--no-deps --no-build-isolation" in calls and calls.count("-e .") == 1


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_python3_itself_and_nothing_to_do_the_second_time(tree, version):
    add_python(tree, "python3", version)
    status, said, calls = set_up(tree, "--without-sglang")
    assert status == 0 and f"with python3, Python {version}" in said and ".venv-sglang" not in calls
    installed_from(tree, tree)
    assert set_up(tree, "--without-sglang") == (0, "", "")
    installed_from(tree, tree.parent)  # the environment is another checkout's
    assert set_up(tree, "--without-sglang")[2].endswith("-e .\n")
    installed_from(tree, tree)
    (tree / "requirements-dev.txt").write_text("ruff\n")
    status, said, calls = set_up(tree, "--without-sglang")
    assert status == 0 and "requirements-dev.txt" in calls and "venv 3" not in calls, (
        "the same environment, once more pip"
    )


def test_python_chooses_and_an_environment_of_another_version_is_made_again(tree):
    add_python(tree, "python3", "3.11")
    set_up(tree, "--without-sglang")
    add_python(tree, "mine", "3.12")
    status, said, calls = set_up(tree, "--without-sglang", PYTHON="mine")
    assert status == 0 and "with mine, Python 3.12" in said and "venv 3.12 .venv\n" in calls
    status, said, calls = set_up(tree, "--without-sglang")
    assert status == 0 and "venv" not in calls.replace(".venv", ""), "without PYTHON the environment keeps its version"


@pytest.mark.parametrize(
    "pythons, environment, message",
    [
        ({"python3": "3.13", "python3.12": "3.13"}, {}, "(python3 is 3.13,python3.12 is 3.13)"),
        ({"python3": "3.11", "old": "3.10"}, {"PYTHON": "old"}, "(old is 3.10)"),
        ({"python3": "3.11"}, {"PYTHON": "/nowhere/python"}, "(/nowhere/python does not run)"),
        ({}, {}, "python3.11 does not run)"),
    ],
)
def test_no_python_that_will_do(tree, pythons, environment, message):
    for name, version in pythons.items():
        add_python(tree, name, version)
    status, said, calls = set_up(tree, **environment)
    assert status == 2 and said.startswith("error: needs Python 3.11 or 3.12 ") and message in said
    assert calls == "" and not (tree / ".venv").exists()


def with_gpu(tree, has_one: bool = True):
    """Give the machine of a tree an NVIDIA GPU, or take it away."""
    path = tree / "bin" / "nvidia-smi"
    path.unlink(missing_ok=True)
    if has_one:
        path.write_text("#!/bin/bash\nexit 0\n")
        path.chmod(0o755)


def made_by(calls: str) -> list[str]:
    """Return the environments that were made from nothing."""
    return [line.split()[-1] for line in calls.splitlines() if line.startswith("venv ")]


def test_an_environment_for_cpus_is_made_again_for_gpus(tree):
    """As on a login node, then on a node with GPUs, then on the login node again."""
    add_python(tree, "python3", "3.11")
    assert made_by(set_up(tree)[2]) == [".venv", ".venv-sglang"]
    installed_from(tree, tree)
    with_gpu(tree)
    status, said, calls = set_up(tree)
    assert status == 0 and made_by(calls) == [".venv", ".venv-sglang-cuda"] and "installing cuda packages" in said
    lock = "requirements-sglang-cuda.txt" if os.uname().machine == "x86_64" else "requirements-sglang.txt"
    assert f".venv-sglang-cuda install -q -r {lock}\n" in calls and "whl/cpu" not in calls
    installed_from(tree, tree)
    assert set_up(tree) == (0, "", "")
    with_gpu(tree, False)
    assert set_up(tree) == (0, "", ""), "one for GPUs serves both, and the server on CPUs is there"
    shutil.rmtree(tree / ".venv-sglang")
    with_gpu(tree)
    assert made_by(set_up(tree, CUDA_VISIBLE_DEVICES="")[2]) == [".venv-sglang"], "the demo on a machine with GPUs"
    (tree / "requirements-test.txt").write_text("pytest\n")
    status, said, calls = set_up(tree, DEVICE="cpu")
    assert made_by(calls) == [] and "installing cuda packages" in said, "it stays one for GPUs"


def test_device_says_what_for(tree):
    add_python(tree, "python3", "3.11")
    status, said, calls = set_up(tree, DEVICE="cuda")  # a login node
    assert status == 0 and made_by(calls) == [".venv", ".venv-sglang-cuda"]
    shutil.rmtree(tree / ".venv")
    with_gpu(tree)
    status, said, calls = set_up(tree, DEVICE="cpu")
    assert status == 0 and made_by(calls) == [".venv", ".venv-sglang"] and "installing cpu packages" in said
    status, said, calls = set_up(tree, DEVICE="rocm")
    assert (status, calls) == (2, "") and said.startswith("error: DEVICE=rocm: expected cuda or cpu: ")


@pytest.mark.parametrize("where, made", [("refuse", []), ("refuse--torch", [".venv"])])
def test_gpus_that_cannot_be_used_are_one_line(tree, where, made):
    """Before anything is installed (the driver), or after (torch); the next attempt begins anew, for CPUs if told
    so."""
    add_python(tree, "python3", "3.11")
    with_gpu(tree)
    (tree / where).touch()
    status, said, calls = set_up(tree)
    assert status == 2 and made_by(calls) == made and said.splitlines()[-1] == "error: refused by check_gpu"
    status, said, calls = set_up(tree, "--without-sglang", DEVICE="cpu")
    assert status == 0 and made_by(calls) == [".venv"] and "installing cpu packages" in said
    (tree / where).unlink()
    status, said, calls = set_up(tree, "--without-sglang")
    assert status == 0 and made_by(calls) == [".venv"] and "installing cuda packages" in said


BACKEND = """
def build_editable(directory, *_):
    import shutil
    return shutil.copy("wheels/megatron_papo-0.2.0-py3-none-any.whl", directory).rpartition("/")[2]
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def add_wheel(tree, name: str, version: str, files: dict[str, str], entry_points: str = ""):
    """Put a package into the directory of wheels."""
    (tree / "wheels").mkdir(exist_ok=True)
    about = f"{name}-{version}.dist-info"
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": entry_points,
    }
    with zipfile.ZipFile(tree / "wheels" / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{about}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"]))


def torch_built_for(cuda: str | None) -> dict[str, str]:
    """Return the files of a torch that says for what it is built, and that it can compute on no GPU."""
    return {
        "torch/__init__.py": "from torch.version import __version__\nfrom torch import cuda, version\n",
        "torch/version.py": f"__version__ = '2.13.0'\ncuda = {cuda!r}\n",
        "torch/cuda.py": "def is_available():\n    return False\n",
    }


def test_without_a_network_from_a_directory_of_wheels(tree):
    """PIP_NO_INDEX and PIP_FIND_LINKS hold; a build for CPUs is not taken for GPUs; .venv is made again by its own
    Python."""
    for room in ("distributed", "sglang"):
        shutil.copytree(ROOT / "megatron_papo" / room, tree / "megatron_papo" / room)
    shutil.copy(ROOT / "megatron_papo" / "errors.py", tree / "megatron_papo")
    shutil.copy(ROOT / "tools" / "check_gpu.py", tree / "tools")
    (tree / "bin" / "python3").symlink_to(sys.executable)
    (tree / "pyproject.toml").write_text(PYPROJECT)
    (tree / "backend.py").write_text(BACKEND)
    (tree / "requirements-test.txt").write_text("small==1.0\n")
    add_wheel(tree, "small", "1.0", {"small.py": ""})
    add_wheel(tree, "megatron_papo", "0.2.0", {}, "[console_scripts]\npapo-convert = small:main\n")
    add_wheel(tree, "torch", "2.13.0+cpu", torch_built_for(None))
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tree / "wheels"), "PIP_CONFIG_FILE": os.devnull}

    def set_up_for(device: str | None):
        return set_up(tree, "--without-sglang", **pip, **({} if device is None else {"DEVICE": device}))[:2]

    def version_of_torch() -> str:
        command = [tree / ".venv" / "bin" / "python", "-m", "pip", "list", "--format=freeze"]
        listed = subprocess.run(command, capture_output=True, text=True, env=pip).stdout.split()
        assert "small==1.0" in listed
        return next(line for line in listed if line.startswith("torch="))

    status, said = set_up_for(None)
    assert status == 0 and version_of_torch() == "torch==2.13.0+cpu", said
    assert (tree / ".venv" / "bin" / "papo-convert").is_file()
    assert set_up_for("cpu") == (0, "")
    (tree / ".venv" / "left_over").touch()
    status, said = set_up_for("cuda")
    assert status == 2 and "error: pip's own choice of torch==2.13.0 is a build for CPUs, and" in said.splitlines()[-1]
    (tree / "wheels" / "torch-2.13.0+cpu-py3-none-any.whl").unlink()
    add_wheel(tree, "torch", "2.13.0", torch_built_for("13.0"))
    status, said = set_up_for("cuda")
    assert status == 0 and version_of_torch() == "torch==2.13.0" and "warning: no C++ compiler" in said, said
    assert not (tree / ".venv" / "left_over").exists()
