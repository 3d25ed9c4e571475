"""No source file evaluates, unpickles or loads code that comes from outside; the few exceptions stand here."""

import ast
import textwrap
from collections.abc import Iterator

from tests.helpers import ROOT

SOURCES = sorted(path for folder in ("megatron_papo", "stages", "tools") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr", "literal_eval"}
"""By name, whatever they belong to, but for re.compile and a module's own eval(), which take no text."""
FORBIDDEN_OF = {
    "os": {"system", "popen"},
    "pickle": {"load", "loads", "Unpickler"},
    "dill": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "runpy": {"run_path", "run_module"},
    "importlib": {"import_module"},
    "yaml": {"unsafe_load", "full_load", "Loader", "FullLoader", "UnsafeLoader"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "pandas": {"read_pickle"},
}
PLAIN_LOADERS = ("_Loader", "yaml.BaseLoader", "yaml.SafeLoader")
"""Of YAML: they make numbers, texts, lists and mappings; the first is config_files.py's, a SafeLoader."""
EXCEPTIONS = {
    ("megatron_papo/model/layer_specs.py", "importlib.import_module"): "names that stand in that file",
    ("megatron_papo/sglang/cpu_launcher.py", "runpy.run_path"): "launcher.py beside it",
    ("tools/gpu_acceptance/__main__.py", "importlib.import_module"): "sections, which stand in that file",
    ("megatron_papo/rollout/safe_parser.py", "sympify"): "given numbers and expressions, never text",
    ("megatron_papo/checkpoint/chunk_data.py", "pickle.Unpickler"): "find_class knows tensors alone",
    ("megatron_papo/checkpoint/torch_dist_files.py", "pickle.Unpickler"): "find_class knows a dozen classes",
}


def findings(source: str) -> Iterator[str]:
    """Return what a source does that it must not, by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in FORBIDDEN_OF.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        if isinstance(node, ast.ImportFrom):
            yield from (
                f"{node.module}.{name.name}"
                for name in node.names
                if name.name in FORBIDDEN_OF.get(node.module or "", ())
            )
        if isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(call: ast.Call) -> Iterator[str]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func).rpartition(".")[0]
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    if name in FORBIDDEN and owner != "re" and (call.args or name == "sympify"):
        yield name
    if given.get("shell"):
        yield "shell=True"
    if given.get("trust_remote_code"):
        yield "trust_remote_code=True"
    if given.get("allow_pickle"):
        yield "allow_pickle=True"
    if (owner, name) == ("np", "load") and given.get("allow_pickle") is not False:
        yield "np.load"
    if (owner, name) == ("torch", "load") and given.get("weights_only") is not True:
        yield "torch.load"
    if (owner, name) == ("yaml", "load") and not any(ast.unparse(given) in PLAIN_LOADERS for given in call.args[1:]):
        yield "yaml.load"
    if name == "from_pretrained" and owner.startswith("Auto") and given.get("trust_remote_code") is not False:
        yield "from_pretrained without trust_remote_code=False"


def test_nothing_from_outside_is_evaluated():
    there = {(str(path.relative_to(ROOT)), found) for path in SOURCES for found in findings(path.read_text())}
    assert there == set(EXCEPTIONS)


def test_each_kind_is_found():
    """The control."""
    source = """
        eval(text); exec(text); compile(text, "", "exec"); sympify(text); sympy.parse_expr(text)
        os.system(text); pickle.loads(data); torch.load(path); torch.load(path, weights_only=False); np.load(path)
        yaml.load(text, yaml.Loader); yaml.load(text); subprocess.run(text, shell=True)
        AutoConfig.from_pretrained(path); AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        importlib.import_module(text); datasets.load_dataset(name, trust_remote_code=True)
        from pickle import load
    """
    assert sorted(findings(textwrap.dedent(source))) == sorted(
        ["eval", "exec", "compile", "sympify", "parse_expr", "os.system", "pickle.loads", "torch.load", "torch.load"]
        + ["np.load", "yaml.Loader", "yaml.load", "yaml.load", "shell=True", "trust_remote_code=True"]
        + ["from_pretrained without trust_remote_code=False"] * 2
        + ["importlib.import_module", "trust_remote_code=True", "pickle.load"]
    )
    harmless = """
        re.compile(text); model.eval(); torch.load(path, weights_only=True); yaml.load(text, _Loader)
        np.load(path, allow_pickle=False); AutoConfig.from_pretrained(path, trust_remote_code=False)
    """
    assert list(findings(textwrap.dedent(harmless))) == []
