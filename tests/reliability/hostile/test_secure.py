"""T15: what no code here may do, found in its syntax; and that the commands need no network."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.command_line import SHARDKIT, environment
from tests.helpers.real_inputs import shared

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "shardkit"
SOURCES = sorted(
    p for top in ("shardkit", "tests", "benchmarks") for p in (ROOT / top).rglob("*.py")
)
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
# They pickle what they send, or run what they load.
CALLS = {
    "yaml.load", "torch.hub.load", "torch.jit.load", "numpy.load", "np.load", "pandas.read_pickle",
}  # fmt: skip
OBJECTS = ("_object", "_object_list", "get_class_from_dynamic_module")
UNPICKLER = "shardkit/checkpoint/pickled/sandbox.py"

OPENERS = {"open", "fdopen", "read_bytes", "read_text", "safe_open", "load_file", "from_pretrained",
           "memmap", "fromfile", "mmap"}  # fmt: skip
# Where the package opens a file otherwise than by shardkit.files, and why it may.
OPENED = {
    "shardkit/files.py": "the safe opener itself",
    "shardkit/output/atomic.py": "folders of the output, to sync and to lock",
    "shardkit/output/publish.py": "the output: exclusive, no links, its own folders",
    "shardkit/runtime/benchmark/measure_rank.py": "the unsharded model, by transformers, headers"
    " checked, and the kernel's own files about this process",
    "shardkit/runtime/benchmark/run_contenders.py": "what the benchmark's ranks have measured",
    "shardkit/runtime/distributed/cores.py": "the kernel's quota of processors",
    "shardkit/runtime/distributed/shared_memory.py": "memory of another rank, by the kernel",
    "shardkit/runtime/engine/rank_output.py": "a pipe that a rank writes to",
    "shardkit/runtime/layers/product.py": "the kernel's description of the processor",
    "shardkit/checkpoint/pickled/convert.py": "the converted file: exclusive, in its own folder",
    UNPICKLER: "a descriptor that the safe opener opened, and the process's own statm",
    "shardkit/shards/integrity.py": "a map, only if asked for, of what the safe opener opened",
    "shardkit/recipe/catalog.py": "the bundled recipes",
    "shardkit/recipe/model_classes.py": "the bundled table of classes",
    "shardkit/recipe/formats/format.py": "the bundled formats",
    "shardkit/authoring/model_classes.py": "the bundled table of classes, as measured",
    "shardkit/authoring/cross_loading.py": "small models that are measured",
    "shardkit/authoring/forms.py": "a small model that it has made",
    "shardkit/authoring/expert_faults.py": "a small model that it has made",
    "shardkit/authoring/stored_results.py": "the stored results of a checkout",
    "shardkit/authoring/block_agreement.py": "a small model that it has made",
    "shardkit/authoring/served.py": "the stored plans of a checkout",
    "shardkit/authoring/form_check.py": "a small model that forms have made",
    "shardkit/cli/recipes.py": "shows a recipe that the user names",
    "shardkit/cli/recipe_draft.py": "makes the drafted recipe, exclusive",
    "shardkit/cli/demo.py": "the demo's own output",
    "shardkit/cli/report_file.py": "makes the page of a report, exclusive",
    "shardkit/runtime/config.py": "the config this module has just written",
    "shardkit/runtime/engine/stop_flag.py": "memory without a name, which the engine has made",
    "shardkit/verification/block_journal.py": "the journal that the user names: no links",
    "shardkit/output/available_memory.py": "the kernel's own files about memory",
    "shardkit/runtime/engine/prompts.py": "the tokenizer, by transformers, without remote code",
    "shardkit/serve/status_pages.py": "the page, and the kernel's own files about memory",
    "shardkit/verification/streamed_models.py": "how an unsharded model generates",
    "shardkit/verification/input_table.py": "the bundled table of inputs",
    "shardkit/verification/models.py": "the unsharded model, by transformers, its headers checked",
    "shardkit/authoring/masked_sum.py": "a small model that a proof has made",
    "shardkit/authoring/proof.py": "a small model that a proof has made",
    "shardkit/authoring/samples.py": "the bundled samples",
    "shardkit/authoring/format_samples.py": "the bundled samples of formats",
    "shardkit/authoring/format_check.py": "shards of a small model that a proof has made",
    "shardkit/authoring/format_sweep.py": "the recorded results of the formats' proofs",
    "shardkit/authoring/quantize.py": "a small model that a proof has made",
    "shardkit/authoring/sweep.py": "the recorded results of the recipes' proofs",
    "shardkit/authoring/draft/draft_all.py": "the record of the drafted types",
}


def named(node: ast.expr) -> str:
    """A dotted name, or the last part of one."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST, path: str) -> Iterator[str]:
    """What a file does that none may."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt | ast.expr):
            continue
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        for module in modules:
            if module.split(".")[0] in PICKLERS or module in SHELLS | CALLS | {"torch.load"}:
                yield f"{path}:{node.lineno}: imports {module}"
        if isinstance(node, ast.Call):
            yield from (f"{path}:{node.lineno}: {fault}" for fault in call_faults(node, path))


def call_faults(node: ast.Call, path: str) -> Iterator[str]:
    name = named(node.func)
    given = {word.arg: word.value for word in node.keywords}
    if isinstance(node.func, ast.Name) and name in RUNNERS:
        yield f"calls {name}"
    if name in SHELLS | CALLS or name.endswith(OBJECTS):
        yield f"calls {name}"
    if name == "torch.load" and (path != UNPICKLER or not is_bool(given.get("weights_only"), True)):
        yield "calls torch.load"
    for word, refused in {"weights_only": False, "shell": True, "trust_remote_code": True,
                          "allow_pickle": True}.items():  # fmt: skip
        value = given.get(word)
        if (
            value is not None
            and not isinstance(value, ast.Name)
            and not is_bool(value, not refused)
        ):
            yield f"passes {word}={ast.unparse(value)}"


def is_bool(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def opens(tree: ast.AST) -> Iterator[int]:
    """The lines of a file that open another by other means than shardkit.files."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and named(node.func).rpartition(".")[2] in OPENERS:
            yield node.lineno


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_file_unpickles_evaluates_or_starts_a_shell() -> None:
    assert len(SOURCES) > 100
    found = [f for p in SOURCES for f in faults(ast.parse(p.read_text()), shown(p))]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import marshal", "from shelve import open",
        "eval('1')", "exec(text)", "__import__(name)", "compile(a, b, 'exec')", "os.system('ls')",
        "from os import system", "subprocess.run('ls', shell=True)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "from torch import load", "f(weights_only=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "yaml.load(text)",
        "dist.all_gather_object(a, b)", "np.load(x, allow_pickle=True)", "torch.jit.load(path)",
    ],
)  # fmt: skip
def test_the_lint_finds_what_it_looks_for(line: str) -> None:
    assert list(faults(ast.parse(line), "shardkit/x.py"))


def test_files_are_opened_by_the_safe_opener_or_for_a_reason() -> None:
    opening = {
        shown(path) for path in PACKAGE.rglob("*.py") if list(opens(ast.parse(path.read_text())))
    }
    assert opening == set(OPENED)


# In a network namespace of its own even the loopback, over which ranks talk, is down at first.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, UP = 0x8914, 1
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
    fcntl.ioctl(made, SIOCSIFFLAGS, struct.pack("16sH14s", b"lo", UP, b""))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_split_verify_and_generate_work_with_the_network_cut(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1) here to cut the network with")
    cut = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", LOOPBACK_UP]
    if subprocess.run([*cut, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip("this host lets nobody make a network namespace")
    source = shared("models/stories260K")
    for arguments in (
        ["split", str(source), "shards", "--tp", "2"],
        ["verify", "shards", "--against", str(source), "--level", "weights"],
        ["generate", "shards", "Once upon a time", "--max-new-tokens", "4"],
    ):
        done = subprocess.run(
            [*cut, *SHARDKIT[1:], *arguments],
            capture_output=True, text=True, cwd=tmp_path, check=False,
            env=environment(HF_HUB_OFFLINE="0"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
