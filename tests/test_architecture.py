"""The policies of docs/design.md as tests: who may import whom, what stays free of torch, and how big code may grow."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("distill", "teachers", "students")

LEVELS = {
    1: {
        "distill",
        "distill.contracts",
        "distill.config",
        "distill.data_config",
        "distill.report_config",
        "distill.builders",
        "distill.schedules",
        "distill.progress",
    },
    2: {
        "distill.runs",
        "distill.inventory",
        "distill.positions",
        "distill.recipe",
        "distill.shards",
        "distill.records",
        "distill.resources",
        "distill.operations",
        "distill.build",
        "distill.averaging",
        "distill.rounding",
        "distill.balance",
        "distill.batch_parts",
        "distill.ranks",
        "distill.step",
        "distill.trainee",
        "distill.gradient_cache",
        "distill.dropout",
        "distill.optimize",
        "distill.sharding",
        "distill.trackers",
        "distill.interrupts",
        "distill.layouts",
        "distill.data",
        "distill.formats",
        "distill.preprocess",
        "distill.token_rows",
        "distill.onnx_file",
        "distill.prints",
        "distill.predict",
        "distill.runtimes",
        "distill.losses",
        "distill.fusion",
        "distill.tasks",
        "distill.decision",
        "distill.exchange",
        "distill.encoders",
        "distill.multimodal",
        "distill.tapped",
        "distill.dual",
        "distill.retrieval",
        "distill.metrics",
        "distill.shapley",
        "distill.measures",
        "distill.targets",
        "distill.captions",
    },
    3: {"teachers", "students"},
    4: {
        "distill.cache",
        "distill.checkpoint",
        "distill.towers",
        "distill.engine",
        "distill.evaluate",
        "distill.prune",
        "distill.quantization",
        "distill.export",
        "distill.bench",
        "distill.bench_bundle",
        "distill.report",
        "distill.explain",
        "distill.doctor",
        "distill.serving",
        "distill.verification",
    },
    5: {
        "distill.workspace",
        "distill.fitted",
        "distill.inheritance",
        "distill.other_teachers",
        "distill.planning",
        "distill.stages",
        "distill.jobs",
        "distill.recovery",
        "distill.vocabulary",
        "distill.writing",
        "distill.aware",
        "distill.bundles",
        "distill.programs",
        "distill.measured",
        "distill.gate",
        "distill.label_noise",
        "distill.results",
        "distill.explaining",
        "distill.fit",
        "distill.check",
        "distill.sampled",
        "distill.estimate",
        "distill.profile",
        "distill.taps",
        "distill.pipeline",
    },
    6: {
        "distill.cli",
        "distill.cache_commands",
        "distill.explain_command",
        "distill.fit_command",
        "distill.serve_command",
        "distill.verify_command",
        "distill.__main__",
    },
}
"""A module, or a package for all of its modules -> a number: it imports its own number or lower."""

STAGE_IMPORTS = {("distill.engine", "distill.checkpoint"), ("distill.towers", "distill.cache")}
"""Stages do not import each other, but for these: (importer, imported)."""

TORCH_FREE = ("distill.contracts", "distill.config", "distill.recipe", "distill.runs", "distill.preprocess",
              "distill.predict", "distill.serving", "distill.bench_bundle", "distill.inventory", "distill.cli",
              "distill.cache_commands", "distill.explain_command", "distill.serve_command")  # fmt: skip
NAMES_MODELS = {"distill.pipeline"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LOOP_LINES = 400, 60, 120
TRAINING_LOOP = ("distill.engine", "fit")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def level(module: str) -> int:
    """The number of a module, or of the nearest package above it."""
    name = module
    while True:
        found = [number for number, names in LEVELS.items() if name in names and (name != "distill" or name == module)]
        if found:
            return found[0]
        name = name.rpartition(".")[0]
        assert name, f"{module} has no number: add it to LEVELS"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node: ast.AST) -> list[str]:
    """Modules that one statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "relative import"
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in FILES else node.module for name in inside]
    return []


def imports(module: str, *, on_loading_only: bool = False) -> set[str]:
    """Modules that a module imports; those inside functions and under TYPE_CHECKING too, unless told otherwise."""
    found: set[str] = set()
    pending: list[ast.AST] = [tree(module)]
    while pending:
        node = pending.pop()
        found.update(imported(node))
        skipped = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        if not (on_loading_only and skipped):
            pending.extend(ast.iter_child_nodes(node))
    return found


def with_parents(module: str) -> set[str]:
    """A module and the packages whose __init__ runs when it is loaded."""
    parts = module.split(".")
    return {".".join(parts[: end + 1]) for end in range(len(parts))}


def loaded_with(module: str) -> set[str]:
    """All modules that loading a module loads, as far as our own files tell."""
    seen: set[str] = set()
    pending = with_parents(module)
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            if name in FILES:
                for other in imports(name, on_loading_only=True):
                    pending |= with_parents(other)
    return seen


def test_there_is_something_to_check():
    assert len(FILES) > 40 and set(FILES) >= {"distill.engine", "teachers", "students.inherit"}
    assert "torch" in loaded_with("distill.engine") and "numpy" in loaded_with("distill.predict")
    assert {"distill.checkpoint", "distill.losses.objective"} <= imports("distill.engine")


def test_every_file_has_a_number_and_every_number_a_file():
    for module in FILES:
        level(module)
    for names in LEVELS.values():
        assert not [name for name in names if name not in FILES]


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downward(module):
    for other in imports(module) & set(FILES):
        assert level(other) <= level(module), f"{module} ({level(module)}) imports {other} ({level(other)})"


def stage(module: str) -> str:
    """The stage that a file of level 4 belongs to: itself, or its package."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", [module for module in FILES if level(module) == 4])
def test_stages_do_not_import_each_other(module):
    others = {stage(other) for other in imports(module) & set(FILES) if level(other) == 4}
    assert {(stage(module), other) for other in others if other != stage(module)} <= STAGE_IMPORTS


@pytest.mark.parametrize("module", FILES)
def test_only_the_pipeline_names_teachers_and_students(module):
    package = module.split(".")[0]
    named = {other.split(".")[0] for other in imports(module)} & {"teachers", "students"} - {package}
    assert not named or module in NAMES_MODELS, f"{module} imports {sorted(named)}"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch_by_reading(module):
    assert not {"torch", "torchvision", "transformers", "timm"} & loaded_with(module)


def test_no_torch_by_running():
    code = f"import sys, {', '.join(TORCH_FREE)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("module", FILES)
def test_size_of_files(module):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its decorators and its docstring."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        total -= first.end_lineno - first.lineno + 1
    return total


@pytest.mark.parametrize("module", FILES)
def test_size_of_functions(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = MAX_LOOP_LINES if (module, node.name) == TRAINING_LOOP else MAX_FUNCTION_LINES
            assert num_lines(node) <= limit, f"{module}.{node.name} has {num_lines(node)} lines, {limit} are allowed"


def test_files_stay_small_as_a_rule():
    sizes = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values())
    assert sizes[len(sizes) // 2] <= 180


@pytest.mark.parametrize("module", FILES)
def test_no_pickle_and_no_code_from_configs(module):
    names = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec"} and not imports(module) & {"pickle", "importlib.util", "runpy"}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            called = ast.unparse(node.func)
            if called in ("np.load", "numpy.load"):
                assert ast.unparse(keywords["allow_pickle"]) == "False", f"{module}: {ast.unparse(node)}"
            assert called not in ("torch.load", "torch.save", "joblib.load"), module
            assert ast.unparse(keywords.get("trust_remote_code", ast.Constant(False))) == "False", module


@pytest.mark.parametrize("module", FILES)
def test_library_code_does_not_print(module):
    if module in ("distill.cli", "distill.progress", "distill.bench_bundle"):  # the last is a script too
        return
    calls = [node.func for node in ast.walk(tree(module)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
